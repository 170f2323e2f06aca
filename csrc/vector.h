// The CPU's vectors of float32, for kernels whose loops the compiler does not turn into whole vectors by itself.
#pragma once

#include <cstdint>

namespace megatron_step {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRegisters = 32;
#else
constexpr int64_t kLanes = 8, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

inline Vector load(const float* source) { return *reinterpret_cast<const Vector*>(source); }
inline void store(float* target, Vector value) { *reinterpret_cast<Vector*>(target) = value; }

}  // namespace megatron_step

// GCC would rather read a value from memory in every multiplication that uses it, and be bound by loads.
#if defined(__AVX__)
#define MEGATRON_STEP_KEEP_IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define MEGATRON_STEP_KEEP_IN_REGISTER(vector)
#endif
