// Cross-entropy of rows of logits [t, v], where this rank holds v columns of a vocabulary that may be split over ranks.
// Forward returns, per row, what ranks combine into the loss (fp32):
//     maximum = max_j logits_j      sum = sum_j exp(logits_j - maximum)      target = logits_label, 0 if not on this rank
// Backward, given the log-sum-exp over the whole vocabulary and the loss gradient g, in place of the logits:
//     logits_j <- g * (exp(logits_j - logsumexp) - [j = label])
// Only the first `columns` columns take part: those after them pad the vocabulary, and their gradient is 0. A label
// outside [0, columns) belongs to another rank or is ignored.
#include "operations.h"

namespace megatron_step {
namespace {

template <typename scalar_t>
std::pair<float, float> maximum_and_sum(const scalar_t* row, int64_t columns) {
  float maximum = -HUGE_VALF;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < columns; ++j) {
    maximum = std::max(maximum, to_float(row[j]));
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) {
    sum += exponential(to_float(row[j]) - maximum);
  }
  return {maximum, sum};
}

template <typename scalar_t>
void backward_row(scalar_t* row, int64_t label, float logsumexp, float gradient, int64_t columns, int64_t width) {
  const bool here = label >= 0 && label < columns;
  const float probability = here ? exponential(to_float(row[label]) - logsumexp) : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    row[j] = from_float<scalar_t>(gradient * exponential(to_float(row[j]) - logsumexp));
  }
  std::fill(row + columns, row + width, from_float<scalar_t>(0.0f));
  if (here) {
    row[label] = from_float<scalar_t>(gradient * (probability - 1.0f));
  }
}

}  // namespace

at::Tensor cross_entropy_forward(const at::Tensor& logits, const at::Tensor& labels, int64_t columns) {
  const int64_t t = logits.size(0), width = logits.size(1);
  at::Tensor result = at::empty({3, t}, logits.options().dtype(at::kFloat));
  float* maximum = result.mutable_data_ptr<float>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  MEGATRON_STEP_DISPATCH(logits, "cross_entropy", [&] {
    at::parallel_for(0, t, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* values = logits.const_data_ptr<scalar_t>() + row * width;
        std::tie(maximum[row], maximum[t + row]) = maximum_and_sum(values, columns);
        const bool here = label[row] >= 0 && label[row] < columns;
        maximum[2 * t + row] = here ? to_float(values[label[row]]) : 0.0f;
      }
    });
  });
  return result;
}

void cross_entropy_backward_(at::Tensor& logits, const at::Tensor& labels, const at::Tensor& logsumexp,
                             const at::Tensor& gradient, int64_t columns) {
  const int64_t t = logits.size(0), width = logits.size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  MEGATRON_STEP_DISPATCH(logits, "cross_entropy", [&] {
    at::parallel_for(0, t, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row(logits.mutable_data_ptr<scalar_t>() + row * width, label[row],
                     logsumexp.const_data_ptr<float>()[row], gradient.const_data_ptr<float>()[row], columns, width);
      }
    });
  });
}

}  // namespace megatron_step
