// Both gradients that follow from the output's gradient dy, in one pass over dy, for 16-bit types and ranks up to 32:
//     du = s dy B                  [tokens, r], in parts: one for each 256 columns of dy
//     dB = s dyᵀ u                 [n, r], in parts: one for each part of the tokens
// A block has 256 columns and a part of the tokens. In each tile of 64 tokens, a warp computes du for 16 tokens and adds
// to dB for 64 columns. For larger ranks, adding the parts takes longer than a second pass over dy; adapter_shrink and
// adapter_factor_gradient are used there.
#include "cuda_product.cuh"

namespace megatron_step {
namespace {

constexpr int kColumns = kGradientColumns;
constexpr int kWarpColumns = kColumns / kWarps;

template <typename T, int RANK>
struct PassTiles {
  using DY = Tile<T, kTile, kColumns>;
  using U = Tile<T, kTile, RANK>;
  using B = Tile<T, kColumns, RANK>;
  static constexpr int kStage = DY::kElements + U::kElements;
  static constexpr int kElements = 2 * kStage + B::kElements;

  DY dy;
  U u;
  B b;

  __device__ PassTiles(T* shared, int stage)
      : dy{shared + stage * kStage}, u{shared + stage * kStage + DY::kElements}, b{shared + 2 * kStage} {}
};

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads)
    output_gradients(Matrix<T> dy, const float* u, Matrix<T> b, float* du_parts, float* db_parts, int64_t part,
                     float scaling) {
  using Tiles = PassTiles<T, RANK>;
  const int64_t rank = b.columns, first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t begin = blockIdx.y * part, end = begin + part < dy.rows ? begin + part : dy.rows;
  T* shared = shared_memory<T>();

  const auto start = [&](int stage, int64_t token) {
    if (token < end) {
      const Tiles next(shared, stage);
      next.dy.load(dy, token, first_column);
      commit_copies();
      next.u.load_rounded(u, dy.rows, rank, token, 0);
    } else {
      commit_copies();
    }
  };

  Tiles(shared, 0).b.load(b, first_column, 0);  // in the first group of copies
  Outputs db[kWarpColumns / 16][RANK / 16] = {};
  float* du_part = du_parts + blockIdx.x * dy.rows * rank;
  int stage = 0;
  start(stage, begin);
  for (int64_t token = begin; token < end; token += kTile, stage ^= 1) {
    start(stage ^ 1, token + kTile);
    wait_copies<1>();
    __syncthreads();
    const Tiles now(shared, stage);

    Outputs du[RANK / 16] = {};
    for (int k = 0; k < kColumns; k += 16) {
      const auto left = load_operand<Side::kLeft, Sum::kAlongRow>(now.dy, warp() * 16, k);
#pragma unroll
      for (int j = 0; j < RANK / 16; ++j) {
        multiply(du[j], left, load_operand<Side::kRight, Sum::kFromRowToRow>(now.b, j * 16, k));
      }
    }
#pragma unroll
    for (int j = 0; j < RANK / 16; ++j) {
      for_each_output(du[j], [&](int row, int column, float value) {
        const int64_t to = token + warp() * 16 + row, i = j * 16 + column;
        if (to < dy.rows && i < rank) {
          du_part[to * rank + i] = scaling * value;
        }
      });
    }

    for (int k = 0; k < kTile; k += 16) {
#pragma unroll
      for (int i = 0; i < kWarpColumns / 16; ++i) {
        const auto left = load_operand<Side::kLeft, Sum::kFromRowToRow>(now.dy, warp() * kWarpColumns + i * 16, k);
#pragma unroll
        for (int j = 0; j < RANK / 16; ++j) {
          multiply(db[i][j], left, load_operand<Side::kRight, Sum::kFromRowToRow>(now.u, j * 16, k));
        }
      }
    }
    __syncthreads();  // all threads have read the stage that the next copies overwrite
  }

  float* db_part = db_parts + blockIdx.y * dy.columns * rank;
#pragma unroll
  for (int i = 0; i < kWarpColumns / 16; ++i) {
#pragma unroll
    for (int j = 0; j < RANK / 16; ++j) {
      for_each_output(db[i][j], [&](int row, int column, float value) {
        const int64_t to = first_column + warp() * kWarpColumns + i * 16 + row, to_rank = j * 16 + column;
        if (to < dy.columns && to_rank < rank) {
          db_part[to * rank + to_rank] = scaling * value;
        }
      });
    }
  }
}

template <typename T, int RANK>
void launch_output_gradients(Matrix<T> dy, const float* u, Matrix<T> b, float* du_parts, float* db_parts, int64_t part,
                             float scaling, Stream stream) {
  const dim3 grid(divide_up(dy.columns, kColumns), part_count(dy.rows, part));
  launch("adapter_output_gradients", output_gradients<T, RANK>, grid, kThreads,
         PassTiles<T, RANK>::kElements * sizeof(T), stream, dy, u, b, du_parts, db_parts, part, scaling);
}

}  // namespace

template <typename T>
void adapter_output_gradients(const T* dy, const float* u, const T* b, float* du_parts, float* db_parts, int64_t tokens,
                              int64_t columns, int64_t rank, int64_t part, float scaling, Stream stream) {
  const auto chosen = rank <= 16 ? launch_output_gradients<T, 16> : launch_output_gradients<T, kGradientRank>;
  chosen(Matrix<T>(dy, tokens, columns), u, Matrix<T>(b, columns, rank), du_parts, db_parts, part, scaling, stream);
}

template void adapter_output_gradients(const c10::BFloat16*, const float*, const c10::BFloat16*, float*, float*,
                                       int64_t, int64_t, int64_t, int64_t, float, Stream);
template void adapter_output_gradients(const c10::Half*, const float*, const c10::Half*, float*, float*, int64_t,
                                       int64_t, int64_t, int64_t, float, Stream);

}  // namespace megatron_step
