// Vectors of float32 on the CPU, for kernels whose loops the compiler does not vectorise well.
#pragma once

#include <cstdint>

// Without this, GCC reads a value from memory in every multiplication that uses it, and loads limit the speed.
#if defined(__AVX__)
#define MEGATRON_STEP_KEEP_IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define MEGATRON_STEP_KEEP_IN_REGISTER(vector)
#endif

namespace megatron_step {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRegisters = 32;
#else
constexpr int64_t kLanes = 8, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

inline Vector load(const float* source) { return *reinterpret_cast<const Vector*>(source); }
inline void store(float* target, Vector value) { *reinterpret_cast<Vector*>(target) = value; }

// sum[R][V] += a[R, depth] b[depth, V * lanes], with the sums in registers; a(i, p) is at a[i * a_row + p * a_column].
template <int64_t R, int64_t V>
[[gnu::always_inline]] inline void add_product(Vector (&sum)[R][V], const float* a, int64_t a_row, int64_t a_column,
                                               const float* b, int64_t b_row, int64_t depth) {
  for (int64_t p = 0; p < depth; ++p) {
    Vector b_vector[V];
    for (int64_t v = 0; v < V; ++v) {
      b_vector[v] = load(b + p * b_row + v * kLanes);
      MEGATRON_STEP_KEEP_IN_REGISTER(b_vector[v]);
    }
    for (int64_t i = 0; i < R; ++i) {
      const float a_value = a[i * a_row + p * a_column];
      for (int64_t v = 0; v < V; ++v) {
        sum[i][v] += a_value * b_vector[v];
      }
    }
  }
}

}  // namespace megatron_step
