// AdamW over compact states: decode, update and encode in one pass over memory, a block of 64 columns of a row at a time.
//     g = gradient_factor gradient
//     m = m + (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//     main = decay main - step_size m / (root_factor sqrt(v) + eps)
// weight bf16 [rows, columns], with an int16 remainder, an int8 correction or nothing beside it: ops/main_weight.py
// m and v fp32, or int8 and uint8 codes with bf16 scales [rows, blocks]: ops/moment_codes.py
// Every operation rounds as those of the reference in ops/compact_adamw.py, so that both give the same bits: on
// every processor, with vectors of any width. Hence no products are fused with sums. Loops become vectors only where GCC
// may compute both sides of a choice, whatever exceptions they raise.
#pragma GCC optimize("fp-contract=off", "no-trapping-math")

#include <bit>
#include <optional>

#include "index_hash.h"
#include "operations.h"

#define MEGATRON_STEP_INLINE [[gnu::always_inline]] inline

namespace megatron_step {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kBlock = 64;  // MOMENT_BLOCK of plan/states.py
constexpr float kFirstUnit = 1.0 / 127.0, kSecondUnit = 1.0 / 255.0;
constexpr uint32_t kExponent = 0x7F800000u, kSmallestNormal = 0x00800000u, kLargestBf16 = 0x7F7F0000u;

MEGATRON_STEP_INLINE uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
MEGATRON_STEP_INLINE float of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

// Hyper-parameters of a step.
struct Step {
  float gradient_factor, decay, gradient_share, beta2, square_share, root_factor, eps, step_size;

  Step(double gradient_factor, double decay, double beta1, double beta2, double root_factor, double eps, double step_size)
      : gradient_factor(static_cast<float>(gradient_factor)),
        decay(static_cast<float>(decay)),
        gradient_share(static_cast<float>(1 - beta1)),
        beta2(static_cast<float>(beta2)),
        square_share(static_cast<float>(1 - beta2)),
        root_factor(static_cast<float>(root_factor)),
        eps(static_cast<float>(eps)),
        step_size(static_cast<float>(step_size)) {}
};

// Random bits of `size` elements from `index` on.
MEGATRON_STEP_INLINE void draw(Words seed, uint64_t index, int64_t size, uint32_t* random) {
  const auto fill = [&](int64_t begin, int64_t end) {
    const Words key = index_key(seed, index + static_cast<uint64_t>(begin));
    const uint32_t low = static_cast<uint32_t>(index);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      random[j] = index_hash(low + static_cast<uint32_t>(j), key);
    }
  };
  const uint64_t left = (uint64_t{1} << 32) - (index & 0xFFFFFFFFu);  // elements whose indices agree in the upper word
  if (left >= static_cast<uint64_t>(size)) {
    fill(0, size);
  } else {
    fill(0, static_cast<int64_t>(left));
    fill(static_cast<int64_t>(left), size);
  }
}

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

// m = r |r| with r = k sqrt(scale) / 127
MEGATRON_STEP_INLINE void decode_first(const int8_t* codes, float scale, int64_t size, float* first) {
  const float unit = std::sqrt(scale) * kFirstUnit;
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float root = static_cast<float>(codes[j]) * unit;
    first[j] = root * std::fabs(root);
  }
}

// v = r^4 with r = k scale^(1/4) / 255
MEGATRON_STEP_INLINE void decode_second(const uint8_t* codes, float scale, int64_t size, float* second) {
  const float unit = std::sqrt(std::sqrt(scale)) * kSecondUnit;
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
// k <= r with r = 127 sqrt(|m| / scale), or with a probability of (r^2 - k^2) / ((k + 1)^2 - k^2) the next.
MEGATRON_STEP_INLINE void encode_first(const float* first, const uint32_t* random, float scale, int64_t size,
                                       int32_t* codes) {
  const float levels = scale == 0.0f ? 0.0f : 127.0f / std::sqrt(scale);
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

// k <= r with r^2 = 255^2 sqrt(v / scale), or with a probability of (r^4 - k^4) / ((k + 1)^4 - k^4) the next; at least 1
// for v > 0. `roots` are those of v.
MEGATRON_STEP_INLINE void encode_second(const float* roots, const uint32_t* random, float scale, int64_t size,
                                        int32_t* codes) {
  const float levels = scale == 0.0f ? 0.0f : 65025.0f / std::sqrt(scale);
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

template <typename scalar_t>
MEGATRON_STEP_INLINE void advance_moments(const scalar_t* gradient, const Step& step, int64_t size, float* first,
                                          float* second) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float g = to_float(gradient[j]) * step.gradient_factor;
    first[j] = first[j] + (g - first[j]) * step.gradient_share;
    second[j] = second[j] * step.beta2 + g * g * step.square_share;
  }
}

// The bits of the largest magnitude. NaN has larger bits than any number.
MEGATRON_STEP_INLINE uint32_t peak_of(const float* values, int64_t size) {
  int32_t peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t j = 0; j < size; ++j) {
    peak = std::max(peak, static_cast<int32_t>(bits_of(values[j]) & 0x7FFFFFFFu));
  }
  return static_cast<uint32_t>(peak);
}

// What is subtracted from each main weight, and the square roots of v.
MEGATRON_STEP_INLINE void find_updates(const float* first, const float* second, const Step& step, int64_t size,
                                       float* updates, float* roots) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    roots[j] = std::sqrt(second[j]);
    updates[j] = first[j] / (roots[j] * step.root_factor + step.eps) * step.step_size;
  }
}

MEGATRON_STEP_INLINE uint32_t weight_bits(uint16_t weight) { return static_cast<uint32_t>(weight) << 16; }

// The upper half of a number's bits after an addition to the lower half. NaN stays: adding could make it a zero.
MEGATRON_STEP_INLINE uint16_t upper_half(float number, uint32_t addend) {
  return static_cast<uint16_t>((bits_of(number) + (number == number ? addend : 0u)) >> 16);
}

MEGATRON_STEP_INLINE void update_with_remainder(uint16_t* weight, int16_t* remainder, const float* updates,
                                                const Step& step, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float old = of_bits(weight_bits(weight[j]) + static_cast<uint32_t>(static_cast<int32_t>(remainder[j])));
    const float main = old * step.decay - updates[j];
    weight[j] = upper_half(main, 0x8000u);
    remainder[j] = static_cast<int16_t>(bits_of(main));
  }
}

MEGATRON_STEP_INLINE void update_with_correction(uint16_t* weight, int8_t* correction, const float* updates,
                                                 const uint32_t* random, const Step& step, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float old = of_bits(weight_bits(weight[j]) + static_cast<uint32_t>(static_cast<int32_t>(correction[j]) * 256));
    const float main = old * step.decay - updates[j];
    const uint32_t bits = bits_of(main) + (main == main ? random[j] >> 24 : 0u);
    weight[j] = upper_half(of_bits(bits), 0x8000u);
    correction[j] = static_cast<int8_t>(bits >> 8);
  }
}

MEGATRON_STEP_INLINE void update_weight_alone(uint16_t* weight, const float* updates, const uint32_t* random,
                                              const Step& step, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float main = of_bits(weight_bits(weight[j])) * step.decay - updates[j];
    weight[j] = upper_half(main, std::fabs(main) == HUGE_VALF ? 0u : random[j] >> 16);
  }
}

// The states of a rectangle; a pointer is null where there is no such state.
struct States {
  uint16_t* weight;
  int16_t* remainder;
  int8_t* correction;
  float *first, *second;
  int8_t* first_codes;
  uint8_t* second_codes;
  uint16_t *first_scales, *second_scales;
};

// A rectangle's place, and what its blocks have in common.
struct Rectangle {
  int64_t rows, columns, first_column, blocks;
  uint64_t first_index, row_stride;
  Words moment_seed, weight_seed;

  Rectangle(const Tensor& gradient, int64_t first_column, int64_t first_index, int64_t row_stride, int64_t seed)
      : rows(gradient.size(0)),
        columns(gradient.size(1)),
        first_column(first_column % kBlock),
        blocks(columns == 0 ? 0 : (this->first_column + columns + kBlock - 1) / kBlock),
        first_index(static_cast<uint64_t>(first_index)),
        row_stride(static_cast<uint64_t>(row_stride)),
        moment_seed(seed_words(static_cast<uint64_t>(seed))),
        weight_seed(seed_words(static_cast<uint64_t>(seed) + 1)) {}
};

struct Peaks {
  uint32_t first, second;
};

// m and v after the gradient, of `size` elements from `begin` on, whose scales are at `block`.
template <typename scalar_t>
MEGATRON_STEP_INLINE void fresh_moments(const States& states, const scalar_t* gradient, const Step& step, int64_t begin,
                                        int64_t block, int64_t size, float* first, float* second) {
  if (states.first_codes != nullptr) {
    decode_first(states.first_codes + begin, value_of_scale(states.first_scales[block]), size, first);
    decode_second(states.second_codes + begin, value_of_scale(states.second_scales[block]), size, second);
  } else {
    std::copy_n(states.first + begin, size, first);
    std::copy_n(states.second + begin, size, second);
  }
  advance_moments(gradient + begin, step, size, first, second);
}

template <typename scalar_t>
MEGATRON_STEP_INLINE void update_block(const States& states, const scalar_t* gradient, const Peaks& given,
                                       const Step& step, const Rectangle& rectangle, uint64_t index, int64_t begin,
                                       int64_t block, int64_t size) {
  alignas(64) float first[kBlock], second[kBlock], updates[kBlock], roots[kBlock];
  alignas(64) uint32_t random[kBlock];
  fresh_moments(states, gradient, step, begin, block, size, first, second);
  find_updates(first, second, step, size, updates, roots);
  if (states.remainder != nullptr) {
    update_with_remainder(states.weight + begin, states.remainder + begin, updates, step, size);
  } else {
    draw(rectangle.weight_seed, index, size, random);
    if (states.correction != nullptr) {
      update_with_correction(states.weight + begin, states.correction + begin, updates, random, step, size);
    } else {
      update_weight_alone(states.weight + begin, updates, random, step, size);
    }
  }
  if (states.first_codes == nullptr) {
    std::copy_n(first, size, states.first + begin);
    std::copy_n(second, size, states.second + begin);
    return;
  }
  const uint16_t first_scale = scale_of_peak(std::max(peak_of(first, size), given.first));
  const uint16_t second_scale = scale_of_peak(std::max(peak_of(second, size), given.second));
  states.first_scales[block] = first_scale, states.second_scales[block] = second_scale;
  draw(rectangle.moment_seed, index, size, random);
  alignas(64) int32_t codes[kBlock];
  encode_first(first, random, value_of_scale(first_scale), size, codes);
  narrow(codes, size, states.first_codes + begin);
  encode_second(roots, random, value_of_scale(second_scale), size, codes);
  narrow(codes, size, states.second_codes + begin);
}

// Calls function(row, begin, size, block) for every block: columns from `begin` on; `block` counts over all rows.
template <typename Function>
void for_each_block(const Rectangle& rectangle, const Function& function) {
  constexpr int64_t grain = 256;  // blocks that are worth a thread
  at::parallel_for(0, rectangle.rows * rectangle.blocks, grain, [&](int64_t begin_block, int64_t end_block) {
    for (int64_t block = begin_block; block < end_block; ++block) {
      const int64_t row = block / rectangle.blocks, start = block % rectangle.blocks * kBlock - rectangle.first_column;
      const int64_t begin = std::max<int64_t>(start, 0), end = std::min(start + kBlock, rectangle.columns);
      function(row, begin, end - begin, block);
    }
  });
}

template <typename T>
T* data_or_null(const optional<Tensor>& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->scalar_type() == dtype ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

States states_of(const optional<Tensor>& weight, const optional<Tensor>& remainder, const Tensor& first,
                 const Tensor& second, const optional<Tensor>& first_scale, const optional<Tensor>& second_scale) {
  return {data_or_null<uint16_t>(weight, at::kBFloat16),      data_or_null<int16_t>(remainder, at::kShort),
          data_or_null<int8_t>(remainder, at::kChar),         data_or_null<float>(first, at::kFloat),
          data_or_null<float>(second, at::kFloat),            data_or_null<int8_t>(first, at::kChar),
          data_or_null<uint8_t>(second, at::kByte),           data_or_null<uint16_t>(first_scale, at::kBFloat16),
          data_or_null<uint16_t>(second_scale, at::kBFloat16)};
}

}  // namespace

void compact_adamw_(Tensor& weight, const Tensor& gradient, const optional<Tensor>& remainder, Tensor& first,
                    Tensor& second, const optional<Tensor>& first_scale, const optional<Tensor>& second_scale,
                    const optional<Tensor>& peaks, double gradient_factor, double decay, double beta1, double beta2, double root_factor,
                    double eps, double step_size, int64_t seed, int64_t first_index, int64_t row_stride,
                    int64_t first_column) {
  const States states = states_of(weight, remainder, first, second, first_scale, second_scale);
  const Step step(gradient_factor, decay, beta1, beta2, root_factor, eps, step_size);
  const Rectangle rectangle(gradient, first_column, first_index, row_stride, seed);
  const float* given = peaks.has_value() ? peaks->const_data_ptr<float>() : nullptr;
  const int64_t all_blocks = rectangle.rows * rectangle.blocks;
  MEGATRON_STEP_DISPATCH(gradient, "compact_adamw_", [&] {
    const scalar_t* g = gradient.const_data_ptr<scalar_t>();
    for_each_block(rectangle, [&](int64_t row, int64_t begin, int64_t size, int64_t block) {
      const uint64_t index =
          rectangle.first_index + static_cast<uint64_t>(row) * rectangle.row_stride + static_cast<uint64_t>(begin);
      const Peaks least = given == nullptr ? Peaks{0, 0}
                                           : Peaks{bits_of(given[block]) & 0x7FFFFFFFu,
                                                   bits_of(given[all_blocks + block]) & 0x7FFFFFFFu};
      const int64_t element = row * rectangle.columns + begin;
      if (size == kBlock) {  // a constant: whole vectors
        update_block(states, g, least, step, rectangle, index, element, block, kBlock);
      } else {
        update_block(states, g, least, step, rectangle, index, element, block, size);
      }
    });
  });
}

Tensor compact_adamw_peaks(const Tensor& gradient, const Tensor& first, const Tensor& second,
                           const optional<Tensor>& first_scale, const optional<Tensor>& second_scale,
                           double gradient_factor, double beta1, double beta2, int64_t first_column) {
  const States states = states_of(std::nullopt, std::nullopt, first, second, first_scale, second_scale);
  const Step step(gradient_factor, 1, beta1, beta2, 1, 0, 0);
  const Rectangle rectangle(gradient, first_column, 0, 0, 0);
  const int64_t all_blocks = rectangle.rows * rectangle.blocks;
  Tensor peaks = at::empty({2, rectangle.rows, rectangle.blocks}, gradient.options().dtype(at::kFloat));
  float* result = peaks.mutable_data_ptr<float>();
  MEGATRON_STEP_DISPATCH(gradient, "compact_adamw_peaks", [&] {
    const scalar_t* g = gradient.const_data_ptr<scalar_t>();
    for_each_block(rectangle, [&](int64_t row, int64_t begin, int64_t size, int64_t block) {
      alignas(64) float fresh_first[kBlock], fresh_second[kBlock];
      fresh_moments(states, g, step, row * rectangle.columns + begin, block, size, fresh_first, fresh_second);
      result[block] = of_bits(peak_of(fresh_first, size));
      result[all_blocks + block] = of_bits(peak_of(fresh_second, size));
    });
  });
  return peaks;
}

}  // namespace megatron_step
