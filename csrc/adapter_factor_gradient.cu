// Gradient of a low-rank factor, summed over tokens:
//     dA = s duᵀ drop(x)           [r, k]
//     dB = s dyᵀ u                 [n, r], nothing dropped; for small ranks see adapter_output_gradients.cu
// A block computes RANK rows of the factor and 64 columns, over a part of the tokens; a warp has 16 of the columns.
#include "cuda_product.cuh"

namespace megatron_step {
namespace {

template <typename T, int RANK>
struct GradientStage {
  using X = Tile<T, kTile, kTile>;
  using U = Tile<T, kTile, RANK>;
  static constexpr int kElements = X::kElements + U::kElements;

  X x;
  U u;

  __device__ explicit GradientStage(T* shared) : x{shared}, u{shared + X::kElements} {}
};

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads, kMinimumBlocks<T>)
    factor_gradient(const float* u, Matrix<T> x, Factor layout, float* parts, int64_t rank, int64_t part, float scaling,
                    Dropout dropout) {
  using Stage = GradientStage<T, RANK>;
  // Blocks that read the same part of x are neighbours, so that only the first of them reads from memory.
  const int64_t rank_blocks = divide_up(rank, RANK);
  const int64_t first_column = blockIdx.x / rank_blocks * kTile, first_rank = blockIdx.x % rank_blocks * RANK;
  const int64_t begin = blockIdx.y * part, end = begin + part < x.rows ? begin + part : x.rows;
  T* shared = shared_memory<T>();

  const auto start = [&](int stage, int64_t token) {
    if (token < end) {
      const Stage next(shared + stage * Stage::kElements);
      next.x.load(x, token, first_column);
      commit_copies();
      next.u.load_rounded(u, x.rows, rank, token, first_rank);
    } else {
      commit_copies();
    }
  };

  Outputs sums[RANK / 16] = {};
  int stage = 0;
  start(stage, begin);
  for (int64_t token = begin; token < end; token += kTile, stage ^= 1) {
    start(stage ^ 1, token + kTile);
    wait_copies<1>();
    const Stage now(shared + stage * Stage::kElements);
    now.x.drop(dropout, token, first_column);
    __syncthreads();
    for (int k = 0; k < kTile; k += 16) {
      const auto right = load_operand<Side::kRight, Sum::kFromRowToRow>(now.x, warp() * 16, k);
#pragma unroll
      for (int i = 0; i < RANK / 16; ++i) {
        multiply(sums[i], load_operand<Side::kLeft, Sum::kFromRowToRow>(now.u, i * 16, k), right);
      }
    }
    __syncthreads();  // all threads have read the stage that the next copies overwrite
  }

  float* out = parts + blockIdx.y * rank * x.columns;
  const int64_t rank_step = layout == Factor::kRankFirst ? x.columns : 1;
  const int64_t column_step = layout == Factor::kRankFirst ? 1 : rank;
#pragma unroll
  for (int i = 0; i < RANK / 16; ++i) {
    for_each_output(sums[i], [&](int row, int column, float value) {
      const int64_t to_rank = first_rank + i * 16 + row, to_column = first_column + warp() * 16 + column;
      if (to_rank < rank && to_column < x.columns) {
        out[to_rank * rank_step + to_column * column_step] = scaling * value;
      }
    });
  }
}

template <typename T, int RANK>
void launch_factor_gradient(const float* u, Matrix<T> x, Factor layout, float* parts, int64_t rank, int64_t part,
                            float scaling, const Dropout& dropout, Stream stream) {
  const dim3 grid(divide_up(x.columns, kTile) * divide_up(rank, RANK), part_count(x.rows, part));
  launch("adapter_factor_gradient", factor_gradient<T, RANK>, grid, kThreads,
         2 * GradientStage<T, RANK>::kElements * sizeof(T), stream, u, x, layout, parts, rank, part, scaling, dropout);
}

}  // namespace

template <typename T>
void adapter_factor_gradient(const float* u, const T* x, Factor layout, float* parts, int64_t tokens, int64_t columns,
                             int64_t rank, int64_t part, float scaling, const Dropout& dropout, Stream stream) {
  const auto chosen = rank <= 16   ? launch_factor_gradient<T, 16>
                      : rank <= 32 ? launch_factor_gradient<T, 32>
                                   : launch_factor_gradient<T, 64>;
  chosen(u, Matrix<T>(x, tokens, columns), layout, parts, rank, part, scaling, dropout, stream);
}

template void adapter_factor_gradient(const float*, const float*, Factor, float*, int64_t, int64_t, int64_t, int64_t,
                                      float, const Dropout&, Stream);
template void adapter_factor_gradient(const float*, const c10::BFloat16*, Factor, float*, int64_t, int64_t, int64_t,
                                      int64_t, float, const Dropout&, Stream);
template void adapter_factor_gradient(const float*, const c10::Half*, Factor, float*, int64_t, int64_t, int64_t,
                                      int64_t, float, const Dropout&, Stream);

}  // namespace megatron_step
