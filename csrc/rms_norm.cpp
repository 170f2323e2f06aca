// Root-mean-square norm of rows x [rows, h] (Zhang and Sennrich, 2019):
//     rstd = 1 / sqrt(mean(x^2) + epsilon)        y = x * rstd * weight
// Backward, with g = dy * weight and xhat = x * rstd:
//     dx = rstd * (g - xhat * mean(g * xhat))     dweight = sum over rows of dy * xhat
// rstd [rows] is kept in fp32. dweight is summed over chunks of 64 rows, then over chunks in order.
#include "operations.h"

namespace megatron_step {
namespace {

constexpr int64_t kRowsPerChunk = 64;

template <typename scalar_t, typename weight_t>
void forward_rows(const scalar_t* x, const weight_t* weight, scalar_t* y, float* rstd, int64_t begin, int64_t end,
                  int64_t h, double epsilon) {
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* x_row = x + row * h;
    scalar_t* y_row = y + row * h;
    const double sum = sum_of(h, [&](int64_t i) { return to_float(x_row[i]) * to_float(x_row[i]); });
    const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(h) + epsilon));
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < h; ++i) {
      y_row[i] = from_float<scalar_t>(to_float(x_row[i]) * scale * to_float(weight[i]));
    }
  }
}

template <typename scalar_t, typename weight_t>
void backward_row(const scalar_t* dy, const scalar_t* x, const weight_t* weight, float rstd, scalar_t* dx, float* dweight,
                  int64_t h) {
  const double dot = sum_of(h, [&](int64_t i) { return to_float(dy[i]) * to_float(weight[i]) * to_float(x[i]); });
  const float mean = static_cast<float>(dot * rstd / static_cast<double>(h));
  if (dx != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < h; ++i) {
      dx[i] = from_float<scalar_t>(rstd * (to_float(dy[i]) * to_float(weight[i]) - to_float(x[i]) * rstd * mean));
    }
  }
  if (dweight != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < h; ++i) {
      dweight[i] += to_float(dy[i]) * to_float(x[i]) * rstd;
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  const at::Tensor input = x.contiguous(), scale = weight.contiguous();
  const int64_t h = scale.numel(), rows = input.numel() / h;
  at::Tensor y = at::empty(input.sizes(), input.options());
  at::Tensor rstd = at::empty({rows}, input.options().dtype(at::kFloat));
  MEGATRON_STEP_DISPATCH(input, "rms_norm", [&] {
    using input_t = scalar_t;
    MEGATRON_STEP_DISPATCH(scale, "rms_norm", [&] {
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        forward_rows(input.const_data_ptr<input_t>(), scale.const_data_ptr<scalar_t>(), y.mutable_data_ptr<input_t>(),
                     rstd.mutable_data_ptr<float>(), begin, end, h, epsilon);
      });
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                     const at::Tensor& rstd, bool need_dx, bool need_dweight) {
  const at::Tensor gradient = dy.contiguous(), input = x.contiguous(), scale = weight.contiguous();
  const int64_t h = scale.numel(), rows = input.numel() / h, chunks = at::divup(rows, kRowsPerChunk);
  at::Tensor dx = need_dx ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
  at::Tensor partial = at::zeros({need_dweight ? chunks : 0, h}, input.options().dtype(at::kFloat));
  MEGATRON_STEP_DISPATCH(input, "rms_norm", [&] {
    using input_t = scalar_t;
    MEGATRON_STEP_DISPATCH(scale, "rms_norm", [&] {
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * kRowsPerChunk; row < std::min(end * kRowsPerChunk, rows); ++row) {
          backward_row(gradient.const_data_ptr<input_t>() + row * h, input.const_data_ptr<input_t>() + row * h,
                       scale.const_data_ptr<scalar_t>(), rstd.const_data_ptr<float>()[row],
                       need_dx ? dx.mutable_data_ptr<input_t>() + row * h : nullptr,
                       need_dweight ? partial.mutable_data_ptr<float>() + row / kRowsPerChunk * h : nullptr, h);
        }
      });
    });
  });
  return {dx, need_dweight ? partial.sum(0).to(weight.scalar_type()) : at::empty({0}, weight.options())};
}

}  // namespace megatron_step
