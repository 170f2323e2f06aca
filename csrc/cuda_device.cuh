// GPU features that C++ lacks: asynchronous copies, matrix loads, matrix products, launches. Only this file has PTX. The
// tests replace it by an emulation (tests/emulation), which runs the kernels on the CPU.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef MEGATRON_STEP_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

namespace megatron_step {

// Copies 16 bytes to shared memory: the first `bytes` from global memory, then zeros. Both addresses are multiples of 16.
// The copying thread sees the data after a wait; other threads see them after a wait and a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies except the newest PENDING.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements, one warp together: lane 8 i + j gives the address of row j of matrix i.
// In words[i], lane l gets the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i, or of its transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8], one warp together, summed in float, in the layout of PTX m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The block's shared memory, with the size given at the launch.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// Runs kernel(arguments...) on a grid of blocks; throws std::runtime_error if the GPU refuses.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": the GPU refused a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " blocks of " + std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory: " + cudaGetErrorString(error));
  }
}

}  // namespace megatron_step
#endif
