// fp32 main weights from and into a bf16 weight, a 16-bit remainder and the sign of the second moment, bit for bit.
//     bits(main) = (bits(weight) << 16) + remainder + 1 where the sign of v is set,    weight = main to nearest even
// ops/main_weight.py explains the encoding.
#include <bit>

#include "operations.h"

namespace megatron_step {
namespace {

constexpr int64_t kGrain = 16384;
constexpr uint32_t kSign = 0x80000000u;

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace

at::Tensor join_main(const at::Tensor& weight, const at::Tensor& remainder, at::Tensor& second) {
  at::Tensor main = at::empty(second.sizes(), second.options());
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const auto* r = remainder.const_data_ptr<int16_t>();
  auto *v = data<uint32_t>(second), *result = data<uint32_t>(main);
  at::parallel_for(0, main.numel(), kGrain, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      result[i] = (static_cast<uint32_t>(w[i]) << 16) + static_cast<uint32_t>(static_cast<int32_t>(r[i])) + (v[i] >> 31);
      v[i] &= ~kSign;
    }
  });
  return main;
}

void split_main_(const at::Tensor& main, at::Tensor& weight, at::Tensor& remainder, at::Tensor& second) {
  const auto* m = main.const_data_ptr<float>();
  auto* w = data<uint16_t>(weight);
  auto* r = data<int16_t>(remainder);
  auto* v = data<uint32_t>(second);
  at::parallel_for(0, main.numel(), kGrain, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      w[i] = from_float<at::BFloat16>(m[i]).x;
      const int32_t difference =
          static_cast<int32_t>(std::bit_cast<uint32_t>(m[i]) - (static_cast<uint32_t>(w[i]) << 16));
      r[i] = static_cast<int16_t>(std::clamp(difference, -32768, 32767));  // of NaN it is any number: NaN stays NaN
      v[i] |= difference == 32768 ? kSign : 0u;
    }
  });
}

}  // namespace megatron_step
