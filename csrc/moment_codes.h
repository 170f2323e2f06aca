// Moments in 8 bits with a bf16 scale for each block of 64 columns: the codes of ops/moment_codes.py, bit for bit. Loops over
// a block become vectors in kernels that are compiled with "fp-contract=off" and "no-trapping-math".
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#define MEGATRON_STEP_INLINE [[gnu::always_inline]] inline

namespace megatron_step {

constexpr float kFirstUnit = 1.0 / 127.0, kSecondUnit = 1.0 / 255.0;
constexpr uint32_t kExponent = 0x7F800000u, kSmallestNormal = 0x00800000u, kLargestBf16 = 0x7F7F0000u;

MEGATRON_STEP_INLINE uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
MEGATRON_STEP_INLINE float of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

// The scale of a block in bf16, from the bits of its peak, which is not negative.
inline uint16_t scale_of_peak(uint32_t peak) {
  if (peak < kSmallestNormal) {
    return 0;
  }
  if (peak >= kExponent) {
    return peak == kExponent ? 0x7F80 : 0x7FC0;
  }
  return static_cast<uint16_t>(std::min((peak + 0xFFFFu) & 0xFFFF0000u, kLargestBf16) >> 16);
}

inline float value_of_scale(uint16_t scale) { return of_bits(static_cast<uint32_t>(scale) << 16); }

// m = r |r| with r = k unit,    unit = sqrt(scale) / 127
MEGATRON_STEP_INLINE void decode_first(const int8_t* codes, float unit, int64_t size, float* first) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float root = static_cast<float>(codes[j]) * unit;
    first[j] = root * std::fabs(root);
  }
}

// v = r^4 with r = k unit,    unit = scale^(1/4) / 255
MEGATRON_STEP_INLINE void decode_second(const uint8_t* codes, float unit, int64_t size, float* second) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float root = static_cast<float>(codes[j]) * unit;
    second[j] = (root * root) * (root * root);
  }
}

// 1 with a probability of rest / step, else 0, from 16 random bits; 0 for NaN.
MEGATRON_STEP_INLINE int32_t rounded_up(uint32_t random, float step, float rest) {
  return (static_cast<float>(static_cast<int32_t>(random)) + 0.5f) * step < 65536.0f * rest ? 1 : 0;
}

// A NaN becomes code 0, and stays NaN: its block's scale is NaN.
// k <= r with r = levels sqrt(|m|),    levels = 127 / sqrt(scale), or with a probability of
// (r^2 - k^2) / ((k + 1)^2 - k^2) the next.
MEGATRON_STEP_INLINE void encode_first(const float* first, const uint32_t* random, float levels, int64_t size,
                                       int32_t* codes) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float root = std::sqrt(std::fabs(first[j])) * levels;
    const int32_t code = static_cast<int32_t>(root);
    const float k = static_cast<float>(code);
    const int32_t magnitude =
        std::min(code + rounded_up(random[j] & 0xFFFFu, k + (k + 1.0f), (root - k) * (root + k)), 127);
    const int32_t sign = static_cast<int32_t>(bits_of(first[j])) >> 31;  // 0 or -1
    codes[j] = (magnitude ^ sign) - sign;
  }
}

// k <= r with r^2 = levels sqrt(v),    levels = 255^2 / sqrt(scale), or with a probability of
// (r^4 - k^4) / ((k + 1)^4 - k^4) the next; at least 1 for v > 0. `roots` are those of v.
MEGATRON_STEP_INLINE void encode_second(const float* roots, const uint32_t* random, float levels, int64_t size,
                                        int32_t* codes) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float square = roots[j] * levels;
    const int32_t code = static_cast<int32_t>(std::sqrt(square));
    const float k = static_cast<float>(code), lower = k * k, upper = (k + 1.0f) * (k + 1.0f);
    const float step = (upper - lower) * (upper + lower), rest = (square - lower) * (square + lower);
    const int32_t least = roots[j] > 0.0f ? 1 : 0;
    codes[j] = std::max(std::min(code + rounded_up(random[j] >> 16, step, rest), 255), least);
  }
}

template <typename Code>
MEGATRON_STEP_INLINE void narrow(const int32_t* codes, int64_t size, Code* target) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    target[j] = static_cast<Code>(codes[j]);
  }
}

}  // namespace megatron_step
