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

#include <optional>

#include "index_hash.h"
#include "moment_codes.h"
#include "operations.h"

namespace megatron_step {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kBlock = 64;  // MOMENT_BLOCK of plan/states.py
constexpr int64_t kGroup = 8;   // blocks of a row that are computed together

// Hyper-parameters of a step.
struct Step {
  float gradient_factor, decay, gradient_share, beta2, square_share, root_factor, eps, step_size;

  Step(double gradient_factor, double decay, double beta1, double beta2, double root_factor, double eps,
       double step_size)
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


// The moments after the gradient, the square roots of v, and what is subtracted from each main weight.
template <typename scalar_t>
MEGATRON_STEP_INLINE void advance(const scalar_t* gradient, const Step& step, int64_t size, float* first, float* second,
                                  float* roots, float* updates) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const float g = to_float(gradient[j]) * step.gradient_factor;
    first[j] = first[j] + (g - first[j]) * step.gradient_share;
    second[j] = second[j] * step.beta2 + g * g * step.square_share;
    roots[j] = std::sqrt(second[j]);
    updates[j] = first[j] / (roots[j] * step.root_factor + step.eps) * step.step_size;
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

// Blocks of one row that are computed together. Its elements are `size` from `begin` on in the rectangle's memory.
struct Group {
  int64_t row, column, begin, size, first_block, blocks;
  int64_t cut;  // columns of the first block that lie left of the rectangle
};

// A group's values on their way.
struct Values {
  alignas(64) float first[kGroup * kBlock], second[kGroup * kBlock], roots[kGroup * kBlock], updates[kGroup * kBlock];
  alignas(64) uint32_t random[kGroup * kBlock];
  alignas(64) int32_t codes[kGroup * kBlock];
};

// Calls function(block, begin, size) for the blocks of a group; the size of a whole block is a constant.
template <typename Function>
MEGATRON_STEP_INLINE void for_each_block(const Group& group, const Function& function) {
  for (int64_t block = 0; block < group.blocks; ++block) {
    const int64_t begin = std::max<int64_t>(block * kBlock - group.cut, 0);
    const int64_t end = std::min((block + 1) * kBlock - group.cut, group.size);
    if (end - begin == kBlock) {
      function(block, begin, kBlock);
    } else {
      function(block, begin, end - begin);
    }
  }
}

// m and v after the gradient, their roots and the updates.
template <typename scalar_t>
MEGATRON_STEP_INLINE void fresh_moments(const States& states, const scalar_t* gradient, const Step& step,
                                        const Group& group, Values& values) {
  if (states.first_codes == nullptr) {
    std::copy_n(states.first + group.begin, group.size, values.first);
    std::copy_n(states.second + group.begin, group.size, values.second);
  } else {
    float first_units[kGroup], second_units[kGroup];
    for (int64_t block = 0; block < group.blocks; ++block) {
      first_units[block] = std::sqrt(value_of_scale(states.first_scales[group.first_block + block])) * kFirstUnit;
      second_units[block] =
          std::sqrt(std::sqrt(value_of_scale(states.second_scales[group.first_block + block]))) * kSecondUnit;
    }
    for_each_block(group, [&](int64_t block, int64_t begin, int64_t size) {
      decode_first(states.first_codes + group.begin + begin, first_units[block], size, values.first + begin);
      decode_second(states.second_codes + group.begin + begin, second_units[block], size, values.second + begin);
    });
  }
  advance(gradient + group.begin, step, group.size, values.first, values.second, values.roots, values.updates);
}

MEGATRON_STEP_INLINE void update_weights(const States& states, const Step& step, const Group& group, Words seed,
                                         uint64_t index, Values& values) {
  uint16_t* weight = states.weight + group.begin;
  if (states.remainder != nullptr) {
    update_with_remainder(weight, states.remainder + group.begin, values.updates, step, group.size);
    return;
  }
  draw(seed, index, group.size, values.random);
  if (states.correction != nullptr) {
    update_with_correction(weight, states.correction + group.begin, values.updates, values.random, step, group.size);
  } else {
    update_weight_alone(weight, values.updates, values.random, step, group.size);
  }
}

// The peaks of a group's blocks, at least as large as those given, if any are.
MEGATRON_STEP_INLINE void find_peaks(const Group& group, const float* values, const float* given, uint32_t* peaks) {
  for_each_block(group, [&](int64_t block, int64_t begin, int64_t size) {
    const uint32_t least = given == nullptr ? 0u : bits_of(given[group.first_block + block]) & 0x7FFFFFFFu;
    peaks[block] = std::max(peak_of(values + begin, size), least);
  });
}

// Writes the scales of blocks, and gives levels / sqrt(scale) of each, or 0 where the scale is 0.
MEGATRON_STEP_INLINE void store_scales(const uint32_t* peaks, float levels, int64_t blocks, uint16_t* scales,
                                       float* factors) {
  for (int64_t block = 0; block < blocks; ++block) {
    scales[block] = scale_of_peak(peaks[block]);
    const float scale = value_of_scale(scales[block]);
    factors[block] = scale == 0.0f ? 0.0f : levels / std::sqrt(scale);
  }
}

MEGATRON_STEP_INLINE void store_moments(const States& states, const Group& group, const float* first_given,
                                        const float* second_given, Words seed, uint64_t index, Values& values) {
  if (states.first_codes == nullptr) {
    std::copy_n(values.first, group.size, states.first + group.begin);
    std::copy_n(values.second, group.size, states.second + group.begin);
    return;
  }
  uint32_t peaks[kGroup];
  float first_levels[kGroup], second_levels[kGroup];
  find_peaks(group, values.first, first_given, peaks);
  store_scales(peaks, 127.0f, group.blocks, states.first_scales + group.first_block, first_levels);
  find_peaks(group, values.second, second_given, peaks);
  store_scales(peaks, 65025.0f, group.blocks, states.second_scales + group.first_block, second_levels);
  draw(seed, index, group.size, values.random);
  for_each_block(group, [&](int64_t block, int64_t begin, int64_t size) {
    encode_first(values.first + begin, values.random + begin, first_levels[block], size, values.codes + begin);
  });
  narrow(values.codes, group.size, states.first_codes + group.begin);
  for_each_block(group, [&](int64_t block, int64_t begin, int64_t size) {
    encode_second(values.roots + begin, values.random + begin, second_levels[block], size, values.codes + begin);
  });
  narrow(values.codes, group.size, states.second_codes + group.begin);
}

// Calls function(group) for all blocks of a rectangle; a group of whole blocks has a constant size.
template <typename Function>
void for_each_group(const Rectangle& rectangle, const Function& function) {
  constexpr int64_t grain = 32;  // groups that are worth a thread
  const int64_t groups = (rectangle.blocks + kGroup - 1) / kGroup;
  at::parallel_for(0, rectangle.rows * groups, grain, [&](int64_t begin_group, int64_t end_group) {
    for (int64_t i = begin_group; i < end_group; ++i) {
      const int64_t row = i / groups, block = i % groups * kGroup, start = block * kBlock - rectangle.first_column;
      const int64_t column = std::max<int64_t>(start, 0);
      const int64_t end = std::min(start + kGroup * kBlock, rectangle.columns);
      Group group{row,          column,
                  row * rectangle.columns + column, end - column, row * rectangle.blocks + block,
                  std::min(kGroup, rectangle.blocks - block), column - start};
      if (group.size == kGroup * kBlock) {
        group.size = kGroup * kBlock, group.blocks = kGroup, group.cut = 0;
        function(group);
      } else {
        function(group);
      }
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
                    const optional<Tensor>& peaks, double gradient_factor, double decay, double beta1,
                    double beta2, double root_factor,
                    double eps, double step_size, int64_t seed, int64_t first_index, int64_t row_stride,
                    int64_t first_column) {
  const States states = states_of(weight, remainder, first, second, first_scale, second_scale);
  const Step step(gradient_factor, decay, beta1, beta2, root_factor, eps, step_size);
  const Rectangle rectangle(gradient, first_column, first_index, row_stride, seed);
  const float* first_given = peaks.has_value() ? peaks->const_data_ptr<float>() : nullptr;
  const float* second_given = peaks.has_value() ? first_given + rectangle.rows * rectangle.blocks : nullptr;
  MEGATRON_STEP_DISPATCH(gradient, "compact_adamw_", [&] {
    const scalar_t* g = gradient.const_data_ptr<scalar_t>();
    for_each_group(rectangle, [&](const Group& group) __attribute__((always_inline)) {
      const uint64_t index = rectangle.first_index + static_cast<uint64_t>(group.row) * rectangle.row_stride +
                             static_cast<uint64_t>(group.column);
      Values values;
      fresh_moments(states, g, step, group, values);
      update_weights(states, step, group, rectangle.weight_seed, index, values);
      store_moments(states, group, first_given, second_given, rectangle.moment_seed, index, values);
    });
  });
}

Tensor compact_adamw_peaks(const Tensor& gradient, const Tensor& first, const Tensor& second,
                           const optional<Tensor>& first_scale, const optional<Tensor>& second_scale,
                           double gradient_factor, double beta1, double beta2, int64_t first_column) {
  const States states = states_of(std::nullopt, std::nullopt, first, second, first_scale, second_scale);
  const Step step(gradient_factor, 1, beta1, beta2, 1, 0, 0);
  const Rectangle rectangle(gradient, first_column, 0, 0, 0);
  Tensor peaks = at::empty({2, rectangle.rows, rectangle.blocks}, gradient.options().dtype(at::kFloat));
  auto* first_peaks = static_cast<uint32_t*>(peaks.mutable_data_ptr());
  uint32_t* second_peaks = first_peaks + rectangle.rows * rectangle.blocks;
  MEGATRON_STEP_DISPATCH(gradient, "compact_adamw_peaks", [&] {
    const scalar_t* g = gradient.const_data_ptr<scalar_t>();
    for_each_group(rectangle, [&](const Group& group) __attribute__((always_inline)) {
      Values values;
      fresh_moments(states, g, step, group, values);
      find_peaks(group, values.first, nullptr, first_peaks + group.first_block);
      find_peaks(group, values.second, nullptr, second_peaks + group.first_block);
    });
  });
  return peaks;
}

}  // namespace megatron_step
