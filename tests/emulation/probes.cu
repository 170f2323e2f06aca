// Kernels that test the emulation itself, for float and 16-bit types as the adapter's kernels use them.
#include "cuda_product.cuh"

namespace megatron_step {
namespace {

// A barrier that half of the block does not come to.
__global__ void skip_barrier() {
  if (warp() < 2) {
    __syncthreads();
  }
}

// A warp collective that one lane does not come to.
__global__ void skip_collective() {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x != 5) {
    multiply_matrices<c10::BFloat16>(c, a, 0, 0);
  }
}

// words[l][i]: what lane l gets of matrix i by a matrix load of 32 rows of 8, all elements different.
template <bool TRANSPOSED>
__global__ void load_words(uint32_t* words) {
  uint16_t* shared = shared_memory<uint16_t>();
  for (int e = 0; e < 8; ++e) {
    shared[8 * lane() + e] = static_cast<uint16_t>(8 * lane() + e);
  }
  __syncthreads();
  uint32_t got[4];
  load_matrices<TRANSPOSED>(got, shared + 8 * lane());
  for (int i = 0; i < 4; ++i) {
    words[4 * lane() + i] = got[i];
  }
}

// One product of the words that lanes hold: a [32][4], b [32][2], c [32][4].
__global__ void multiply_words(const uint32_t* a, const uint32_t* b, float* c) {
  const uint32_t words[4] = {a[4 * lane()], a[4 * lane() + 1], a[4 * lane() + 2], a[4 * lane() + 3]};
  float sums[4] = {};
  multiply_matrices<c10::BFloat16>(sums, words, b[2 * lane()], b[2 * lane() + 1]);
  for (int i = 0; i < 4; ++i) {
    c[4 * lane() + i] = sums[i];
  }
}

// What is in shared memory before anything is written, before an asynchronous copy is waited for, and after.
__global__ void copy_early(const float* from, float* seen) {
  float* shared = shared_memory<float>();
  if (threadIdx.x > 0) {
    return;
  }
  seen[0] = shared[0];
  copy_async(shared, from, 8);
  commit_copies();
  seen[1] = shared[0];
  copy_async(shared + 4, from, 16);
  commit_copies();
  wait_copies<1>();
  seen[2] = shared[1];
  seen[3] = shared[2];  // beyond the 8 bytes: zero
  seen[4] = shared[4];
  wait_copies<0>();
  seen[5] = shared[7];
}

// The order in which a block's threads come by.
__global__ void visit(int* order, int* visits) { order[(*visits)++] = threadIdx.x; }

template <typename... Parameters, typename... Arguments>
const char* run(void (*kernel)(Parameters...), int threads, Arguments... arguments) {
  static std::string error;
  try {
    launch("probe", kernel, dim3(1), threads, 1024, nullptr, arguments...);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {
const char* probe_skip_barrier() { return run(skip_barrier, kThreads); }
const char* probe_skip_collective() { return run(skip_collective, 32); }
const char* probe_load(uint32_t* words, bool transposed) { return run(transposed ? load_words<true> : load_words<false>, 32, words); }
const char* probe_multiply(const uint32_t* a, const uint32_t* b, float* c) { return run(multiply_words, 32, a, b, c); }
const char* probe_copy(const float* from, float* seen) { return run(copy_early, 32, from, seen); }

const char* probe_threads(int* order, int* visits, int threads) { return run(visit, threads, order, visits); }
}

}  // namespace megatron_step
