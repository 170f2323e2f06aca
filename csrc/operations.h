// The CPU operations, and the functions that they share: conversion of bf16, a vectorisable exponential, choice of type.
//
// All kernels compute in fp32 for every type of tensor. No sum depends on the number of threads: one thread reduces a
// row, and sums over rows are split into chunks of fixed size, which are added in order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace megatron_step {

inline float to_float(float value) { return value; }

inline float to_float(at::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename scalar_t>
inline scalar_t from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Round to nearest even; NaN stays NaN. A select instead of a branch lets the compiler vectorise loops over it.
template <>
inline at::BFloat16 from_float<at::BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return at::BFloat16(static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded), at::BFloat16::from_bits());
}

// e^r by a polynomial of degree 6, where x = n ln 2 + r with |r| <= ln 2 / 2; T is float or a vector of floats. The first
// three coefficients are 1, 1 and 1/2; the others minimise the largest relative error, which is 3.6e-9.
template <typename T>
inline T exponential_of_remainder(T x, T& n) {
  constexpr float shift = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  n = (x * 1.44269504f + shift) - shift;
  const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  T p = 1.3863757486e-3f * r + 8.3675095811e-3f;
  p = p * r + 4.1667237878e-2f;
  p = p * r + 1.6666534543e-1f;
  p = p * r + 0.5f;
  return p * r * r + r + 1.0f;
}

// e^x to about 1 ulp: e^r times 2^n, where 2^n is a product of two powers, so that n = 128 does not overflow. Results
// below the smallest normal number become 0; NaN stays NaN.
inline float exponential(float x) {
  constexpr float low = -87.33654f, high = 88.72284f;
  const float clamped = x < low ? low : (x > high ? high : x);
  float n;
  const float p = exponential_of_remainder(clamped, n);
  const int32_t half = static_cast<int32_t>(n) / 2;
  const int32_t rest = static_cast<int32_t>(n) - half;
  const int32_t first_bits = (half + 127) << 23, second_bits = (rest + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  const float result = p * first * second;
  return x < low ? 0.0f : (x > high ? HUGE_VALF : result);
}

// The sum of term(i) over i < size: fp32 within blocks, fp64 over the blocks, so that the error is that of a short sum.
template <typename Term>
inline double sum_of(int64_t size, const Term& term) {
  constexpr int64_t block = 256;
  double sum = 0.0;
  for (int64_t begin = 0; begin < size; begin += block) {
    const int64_t end = std::min(begin + block, size);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) {
      part += term(i);
    }
    sum += static_cast<double>(part);
  }
  return sum;
}

inline void check_dtype(const at::Tensor& tensor, const char* operation) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, operation,
              ": the CPU kernel takes float32 or bfloat16, not ", tensor.scalar_type());
}

// target[j, i] = source[i, j] for a block of rows x columns in row-major matrices of the given row lengths.
inline void transpose_block(const float* source, int64_t source_row, float* target, int64_t target_row, int64_t rows,
                            int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      target[j * target_row + i] = source[i * source_row + j];
    }
  }
}

// The operations, in the order of their files; each file's first comment is its contract.
at::Tensor adapter_dropout(const at::Tensor& x, double probability, int64_t seed, int64_t first_index,
                           int64_t row_stride);
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& dout, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& out, const at::Tensor& logsumexp,
                                                                  double scale);
void compact_adamw_(at::Tensor& weight, const at::Tensor& gradient, const std::optional<at::Tensor>& remainder,
                    at::Tensor& first, at::Tensor& second, const std::optional<at::Tensor>& first_scale,
                    const std::optional<at::Tensor>& second_scale, const std::optional<at::Tensor>& peaks,
                    double gradient_factor, double decay,
                    double beta1, double beta2, double root_factor, double eps, double step_size, int64_t seed,
                    int64_t first_index, int64_t row_stride, int64_t first_column);
at::Tensor compact_adamw_peaks(const at::Tensor& gradient, const at::Tensor& first, const at::Tensor& second,
                               const std::optional<at::Tensor>& first_scale,
                               const std::optional<at::Tensor>& second_scale, double gradient_factor, double beta1,
                               double beta2, int64_t first_column);
at::Tensor cross_entropy_forward(const at::Tensor& logits, const at::Tensor& labels, int64_t columns);
void cross_entropy_backward_(at::Tensor& logits, const at::Tensor& labels, const at::Tensor& maximum,
                             const at::Tensor& sum, const at::Tensor& gradient, int64_t columns);
at::Tensor join_main(const at::Tensor& weight, const at::Tensor& remainder, at::Tensor& second);
std::tuple<at::Tensor, at::Tensor> narrow_products(const at::Tensor& x, const at::Tensor& left, const at::Tensor& right,
                                                   double scaling);
void rank_update_(at::Tensor& target, const at::Tensor& u, const at::Tensor& factor, double scaling);
std::tuple<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double epsilon);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                     const at::Tensor& rstd, bool need_dx, bool need_dweight);
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed);
std::tuple<at::Tensor, at::Tensor, at::Tensor> split_qkv_rotary_forward(const at::Tensor& qkv, const at::Tensor& cos,
                                                                        const at::Tensor& sin, int64_t heads,
                                                                        int64_t groups);
at::Tensor split_qkv_rotary_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                                     const at::Tensor& cos, const at::Tensor& sin);
void split_main_(const at::Tensor& main, at::Tensor& weight, at::Tensor& remainder, at::Tensor& second);
at::Tensor swiglu_forward(const at::Tensor& x);
at::Tensor swiglu_backward(const at::Tensor& dy, const at::Tensor& x);
at::Tensor transpose(const at::Tensor& matrix);

}  // namespace megatron_step

// Runs the body with `scalar_t` as the C++ type of a float32 or bfloat16 tensor.
#define MEGATRON_STEP_DISPATCH(tensor, operation, ...)            \
  [&] {                                                           \
    ::megatron_step::check_dtype(tensor, operation);              \
    if ((tensor).scalar_type() == at::kFloat) {                   \
      using scalar_t = float;                                     \
      return __VA_ARGS__();                                       \
    }                                                             \
    using scalar_t = at::BFloat16;                                \
    return __VA_ARGS__();                                         \
  }()
