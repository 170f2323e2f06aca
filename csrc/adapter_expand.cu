// The adapter's term of the output, and of the input's gradient: a product that sums only over the rank.
//     y = s u factorᵀ              factor B [n, r], nothing dropped
//     dx = mask * (du factor)      factor A [r, k]
// The term is written, not added: the product with the frozen weight follows, and adds to it while it computes. A block
// has 64 tokens.
#include "cuda_product.cuh"

namespace megatron_step {
namespace {

// Columns of a block: 256 bytes of a row.
template <typename T>
constexpr int kColumns = sizeof(T) == 2 ? 2 * kTile : kTile;

template <typename T, int RANK, Factor LAYOUT>
struct ExpandTiles {
  static constexpr bool kRankFirst = LAYOUT == Factor::kRankFirst;
  using U = Tile<T, kTile, RANK>;
  using A = Tile<T, kRankFirst ? RANK : kColumns<T>, kRankFirst ? kColumns<T> : RANK>;
  static constexpr int kElements = U::kElements + A::kElements;

  U u;
  A factor;

  __device__ explicit ExpandTiles(T* shared) : u{shared}, factor{shared + U::kElements} {}
};

// Two neighbours in a row, stored at once.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

template <typename T, int RANK, Factor LAYOUT>
__global__ void __launch_bounds__(kThreads, kMinimumBlocks<T>)
    expand(const float* u, Matrix<T> factor, T* y, int64_t tokens, int64_t columns, int64_t rank, float scaling,
           Dropout dropout) {
  using Tiles = ExpandTiles<T, RANK, LAYOUT>;
  constexpr Sum factor_sum = Tiles::kRankFirst ? Sum::kFromRowToRow : Sum::kAlongRow;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kColumns<T>;
  const Tiles tiles(shared_memory<T>());

  Outputs sums[kColumns<T> / 16] = {};
  for (int64_t first_rank = 0; first_rank < rank; first_rank += RANK) {
    tiles.factor.load(factor, Tiles::kRankFirst ? first_rank : first_column,
                      Tiles::kRankFirst ? first_column : first_rank);
    commit_copies();
    tiles.u.load_rounded(u, tokens, rank, first_token, first_rank);
    wait_copies<0>();
    __syncthreads();
    for (int k = 0; k < RANK; k += 16) {
      const auto left = load_operand<Side::kLeft, Sum::kAlongRow>(tiles.u, warp() * 16, k);
#pragma unroll
      for (int j = 0; j < kColumns<T> / 16; ++j) {
        multiply(sums[j], left, load_operand<Side::kRight, factor_sum>(tiles.factor, j * 16, k));
      }
    }
    __syncthreads();  // all threads have read the tiles that the next copies overwrite
  }

  const bool in_pairs = columns % 2 == 0;
#pragma unroll
  for (int j = 0; j < kColumns<T> / 16; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int64_t token = first_token + warp() * 16 + output_row(e);
        const int64_t column = first_column + j * 16 + output_column(h, e);
        if (token < tokens && column < columns) {
          const bool masked = dropout.threshold > 0;
          const float first = masked ? dropout.mask(token, column) : 1.0f;
          const float second = masked ? dropout.mask(token, column + 1) : 1.0f;
          const Pair<T> pair = {T(scaling * sums[j][h][e] * first), T(scaling * sums[j][h][e + 1] * second)};
          T* to = y + token * columns + column;
          if (in_pairs) {
            *reinterpret_cast<Pair<T>*>(to) = pair;
          } else {
            to[0] = pair.values[0];
            if (column + 1 < columns) {
              to[1] = pair.values[1];
            }
          }
        }
      }
    }
  }
}

template <typename T, int RANK, Factor LAYOUT>
void launch_expand(const float* u, Matrix<T> factor, T* y, int64_t tokens, int64_t columns, int64_t rank,
                   float scaling, const Dropout& dropout, Stream stream) {
  const dim3 grid(divide_up(tokens, kTile), divide_up(columns, kColumns<T>));
  launch("adapter_expand", expand<T, RANK, LAYOUT>, grid, kThreads,
         ExpandTiles<T, RANK, LAYOUT>::kElements * sizeof(T), stream, u, factor, y, tokens, columns, rank, scaling,
         dropout);
}

template <typename T, Factor LAYOUT>
void choose_rank(const float* u, Matrix<T> factor, T* y, int64_t tokens, int64_t columns, int64_t rank, float scaling,
                 const Dropout& dropout, Stream stream) {
  const auto chosen = rank <= 16   ? launch_expand<T, 16, LAYOUT>
                      : rank <= 32 ? launch_expand<T, 32, LAYOUT>
                                   : launch_expand<T, 64, LAYOUT>;
  chosen(u, factor, y, tokens, columns, rank, scaling, dropout, stream);
}

}  // namespace

template <typename T>
void adapter_expand(const float* u, const T* factor, Factor layout, T* y, int64_t tokens, int64_t columns, int64_t rank,
                    float scaling, const Dropout& dropout, Stream stream) {
  if (layout == Factor::kRankFirst) {
    choose_rank<T, Factor::kRankFirst>(u, Matrix<T>(factor, rank, columns), y, tokens, columns, rank, scaling, dropout,
                                       stream);
  } else {
    choose_rank<T, Factor::kRankLast>(u, Matrix<T>(factor, columns, rank), y, tokens, columns, rank, scaling, dropout,
                                      stream);
  }
}

template void adapter_expand(const float*, const float*, Factor, float*, int64_t, int64_t, int64_t, float,
                             const Dropout&, Stream);
template void adapter_expand(const float*, const c10::BFloat16*, Factor, c10::BFloat16*, int64_t, int64_t, int64_t,
                             float, const Dropout&, Stream);
template void adapter_expand(const float*, const c10::Half*, Factor, c10::Half*, int64_t, int64_t, int64_t, float,
                             const Dropout&, Stream);

}  // namespace megatron_step
