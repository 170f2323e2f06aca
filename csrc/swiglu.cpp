// SwiGLU (Shazeer, 2020) of rows x [rows, 2f] = [gate | up]:
//     y = silu(gate) * up,    silu(z) = z * sigmoid(z)
// Backward, with s = sigmoid(gate):
//     dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * gate * s
#include "operations.h"

namespace megatron_step {
namespace {

template <typename scalar_t>
void forward_row(const scalar_t* x, scalar_t* y, int64_t f) {
#pragma omp simd
  for (int64_t i = 0; i < f; ++i) {
    const float gate = to_float(x[i]);
    y[i] = from_float<scalar_t>(gate / (1.0f + exponential(-gate)) * to_float(x[f + i]));
  }
}

template <typename scalar_t>
void backward_row(const scalar_t* dy, const scalar_t* x, scalar_t* dx, int64_t f) {
#pragma omp simd
  for (int64_t i = 0; i < f; ++i) {
    const float gate = to_float(x[i]), d = to_float(dy[i]);
    const float s = 1.0f / (1.0f + exponential(-gate));
    dx[i] = from_float<scalar_t>(d * to_float(x[f + i]) * s * (1.0f + gate * (1.0f - s)));
    dx[f + i] = from_float<scalar_t>(d * gate * s);
  }
}

}  // namespace

at::Tensor swiglu_forward(const at::Tensor& x) {
  const at::Tensor input = x.contiguous();
  const int64_t f = input.size(-1) / 2, rows = input.numel() / (2 * f);
  auto shape = input.sizes().vec();
  shape.back() = f;
  at::Tensor y = at::empty(shape, input.options());
  MEGATRON_STEP_DISPATCH(input, "swiglu", [&] {
    at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        forward_row(input.const_data_ptr<scalar_t>() + row * 2 * f, y.mutable_data_ptr<scalar_t>() + row * f, f);
      }
    });
  });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor gradient = dy.contiguous(), input = x.contiguous();
  const int64_t f = input.size(-1) / 2, rows = input.numel() / (2 * f);
  at::Tensor dx = at::empty(input.sizes(), input.options());
  MEGATRON_STEP_DISPATCH(input, "swiglu", [&] {
    at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row(gradient.const_data_ptr<scalar_t>() + row * f, input.const_data_ptr<scalar_t>() + row * 2 * f,
                     dx.mutable_data_ptr<scalar_t>() + row * 2 * f, f);
      }
    });
  });
  return dx;
}

}  // namespace megatron_step
