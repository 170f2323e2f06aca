// The product of the input with A, and of the output's gradient with B: both have few columns.
//     u = s drop(x) factorᵀ        factor A [r, k]
//     du = s dy factor             factor B [n, r], nothing dropped
// x is read once, and each element is masked once, in shared memory. The next tile is copied while this one is multiplied.
// A block computes 64 tokens and RANK columns of u, over a part of the columns of x.
#include "cuda_product.cuh"

namespace megatron_step {
namespace {

template <typename T, int RANK, Factor LAYOUT>
struct ShrinkStage {
  static constexpr bool kRankFirst = LAYOUT == Factor::kRankFirst;
  using X = Tile<T, kTile, kTile>;
  using A = Tile<T, kRankFirst ? RANK : kTile, kRankFirst ? kTile : RANK>;
  static constexpr int kElements = X::kElements + A::kElements;

  X x;
  A factor;

  __device__ explicit ShrinkStage(T* shared) : x{shared}, factor{shared + X::kElements} {}
};

template <typename T, int RANK, Factor LAYOUT>
__global__ void __launch_bounds__(kThreads, kMinimumBlocks<T>)
    shrink(Matrix<T> x, Matrix<T> factor, float* parts, int64_t rank, int64_t part, float scaling, Dropout dropout) {
  using Stage = ShrinkStage<T, RANK, LAYOUT>;
  constexpr Sum factor_sum = Stage::kRankFirst ? Sum::kAlongRow : Sum::kFromRowToRow;
  // Blocks that read the same tokens are neighbours, so that only the first of them reads from memory.
  const int64_t rank_blocks = divide_up(rank, RANK);
  const int64_t first_token = blockIdx.x / rank_blocks * kTile, first_rank = blockIdx.x % rank_blocks * RANK;
  const int64_t begin = blockIdx.y * part, end = begin + part < x.columns ? begin + part : x.columns;
  T* shared = shared_memory<T>();

  const auto start = [&](int stage, int64_t column) {
    if (column < end) {
      const Stage next(shared + stage * Stage::kElements);
      next.x.load(x, first_token, column);
      next.factor.load(factor, Stage::kRankFirst ? first_rank : column, Stage::kRankFirst ? column : first_rank);
    }
    commit_copies();
  };

  Outputs sums[RANK / 16] = {};
  int stage = 0;
  start(stage, begin);
  for (int64_t column = begin; column < end; column += kTile, stage ^= 1) {
    start(stage ^ 1, column + kTile);
    wait_copies<1>();
    const Stage now(shared + stage * Stage::kElements);
    now.x.drop(dropout, first_token, column);
    __syncthreads();
    for (int k = 0; k < kTile; k += 16) {
      const auto left = load_operand<Side::kLeft, Sum::kAlongRow>(now.x, warp() * 16, k);
#pragma unroll
      for (int j = 0; j < RANK / 16; ++j) {
        multiply(sums[j], left, load_operand<Side::kRight, factor_sum>(now.factor, j * 16, k));
      }
    }
    __syncthreads();  // all threads have read the stage that the next copies overwrite
  }

  float* out = parts + blockIdx.y * x.rows * rank;
#pragma unroll
  for (int j = 0; j < RANK / 16; ++j) {
    for_each_output(sums[j], [&](int row, int column, float value) {
      const int64_t token = first_token + warp() * 16 + row, i = first_rank + j * 16 + column;
      if (token < x.rows && i < rank) {
        out[token * rank + i] = scaling * value;
      }
    });
  }
}

template <typename T, int RANK, Factor LAYOUT>
void launch_shrink(Matrix<T> x, Matrix<T> factor, float* parts, int64_t rank, int64_t part, float scaling,
                   const Dropout& dropout, Stream stream) {
  const dim3 grid(divide_up(x.rows, kTile) * divide_up(rank, RANK), part_count(x.columns, part));
  launch("adapter_shrink", shrink<T, RANK, LAYOUT>, grid, kThreads,
         2 * ShrinkStage<T, RANK, LAYOUT>::kElements * sizeof(T), stream, x, factor, parts, rank, part, scaling,
         dropout);
}

template <typename T, Factor LAYOUT>
void choose_rank(Matrix<T> x, Matrix<T> factor, float* parts, int64_t rank, int64_t part, float scaling,
                 const Dropout& dropout, Stream stream) {
  const auto chosen = rank <= 16   ? launch_shrink<T, 16, LAYOUT>
                      : rank <= 32 ? launch_shrink<T, 32, LAYOUT>
                                   : launch_shrink<T, 64, LAYOUT>;
  chosen(x, factor, parts, rank, part, scaling, dropout, stream);
}

}  // namespace

template <typename T>
void adapter_shrink(const T* x, const T* factor, Factor layout, float* parts, int64_t tokens, int64_t columns,
                    int64_t rank, int64_t part, float scaling, const Dropout& dropout, Stream stream) {
  const Matrix<T> wide(x, tokens, columns);
  if (layout == Factor::kRankFirst) {
    choose_rank<T, Factor::kRankFirst>(wide, Matrix<T>(factor, rank, columns), parts, rank, part, scaling, dropout,
                                       stream);
  } else {
    choose_rank<T, Factor::kRankLast>(wide, Matrix<T>(factor, columns, rank), parts, rank, part, scaling, dropout,
                                      stream);
  }
}

template void adapter_shrink(const float*, const float*, Factor, float*, int64_t, int64_t, int64_t, int64_t, float,
                             const Dropout&, Stream);
template void adapter_shrink(const c10::BFloat16*, const c10::BFloat16*, Factor, float*, int64_t, int64_t, int64_t,
                             int64_t, float, const Dropout&, Stream);
template void adapter_shrink(const c10::Half*, const c10::Half*, Factor, float*, int64_t, int64_t, int64_t, int64_t,
                             float, const Dropout&, Stream);

}  // namespace megatron_step
