// Cross-entropy of rows of logits [t, v], where this rank holds v columns of a vocabulary that may be split over ranks.
// Forward returns three values per row (fp64), which the ranks combine into the loss:
//     maximum = max_j logits_j      sum = sum_j exp(logits_j - maximum)      target = logits_label, 0 if not on this rank
// Backward, given maximum and sum over the whole vocabulary and the loss gradient g, in place of the logits:
//     logits_j <- g * (exp(logits_j - maximum) / sum - [j = label])
// Only the first `columns` columns take part: those after them pad the vocabulary, and their gradient is 0. A label
// outside [0, columns) belongs to another rank or is ignored.
// The sum is in fp64. In fp32, adding many small terms to the 1 of the likeliest token would lose them, and the split of
// the vocabulary would decide how many. The label's gradient, a difference of nearly equal numbers, is in fp64, too.
#include "operations.h"

namespace megatron_step {
namespace {

template <typename scalar_t>
std::pair<double, double> maximum_and_sum(const scalar_t* row, int64_t columns) {
  float maximum = -HUGE_VALF;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < columns; ++j) {
    maximum = std::max(maximum, to_float(row[j]));
  }
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) {
    sum += static_cast<double>(exponential(to_float(row[j]) - maximum));
  }
  return {maximum, sum};
}

template <typename scalar_t>
void backward_row(scalar_t* row, int64_t label, double maximum, double sum, float gradient, int64_t columns,
                  int64_t width) {
  const bool here = label >= 0 && label < columns;
  const double probability = here ? std::exp(static_cast<double>(to_float(row[label])) - maximum) / sum : 0.0;
  const float shift = static_cast<float>(maximum), factor = static_cast<float>(gradient / sum);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    row[j] = from_float<scalar_t>(factor * exponential(to_float(row[j]) - shift));
  }
  std::fill(row + columns, row + width, from_float<scalar_t>(0.0f));
  if (here) {
    row[label] = from_float<scalar_t>(static_cast<float>(gradient * (probability - 1.0)));
  }
}

}  // namespace

at::Tensor cross_entropy_forward(const at::Tensor& logits, const at::Tensor& labels, int64_t columns) {
  const int64_t t = logits.size(0), width = logits.size(1);
  at::Tensor result = at::empty({3, t}, logits.options().dtype(at::kDouble));
  double* maximum = result.mutable_data_ptr<double>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  MEGATRON_STEP_DISPATCH(logits, "cross_entropy", [&] {
    at::parallel_for(0, t, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* values = logits.const_data_ptr<scalar_t>() + row * width;
        std::tie(maximum[row], maximum[t + row]) = maximum_and_sum(values, columns);
        const bool here = label[row] >= 0 && label[row] < columns;
        maximum[2 * t + row] = here ? to_float(values[label[row]]) : 0.0;
      }
    });
  });
  return result;
}

void cross_entropy_backward_(at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum,
                             const at::Tensor& sum, const at::Tensor& gradient, int64_t columns) {
  const int64_t t = logits.size(0), width = logits.size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  MEGATRON_STEP_DISPATCH(logits, "cross_entropy", [&] {
    at::parallel_for(0, t, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row(logits.mutable_data_ptr<scalar_t>() + row * width, label[row], maximum.const_data_ptr<double>()[row],
                     sum.const_data_ptr<double>()[row], gradient.const_data_ptr<float>()[row], columns, width);
      }
    });
  });
}

}  // namespace megatron_step
