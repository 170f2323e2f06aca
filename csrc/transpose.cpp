// Transposed copy of a matrix, [rows, columns] -> [columns, rows], both contiguous float32. It brings a weight gradient,
// which was computed transposed, into the layout of the weight.
#include "operations.h"

namespace megatron_step {

at::Tensor transpose(const at::Tensor& matrix) {
  constexpr int64_t block = 16;  // a block of the source and one of the target fit the first-level cache
  const at::Tensor source = matrix.contiguous();
  const int64_t rows = source.size(0), columns = source.size(1);
  at::Tensor target = at::empty({columns, rows}, source.options());
  const float* in = source.const_data_ptr<float>();
  float* out = target.mutable_data_ptr<float>();
  at::parallel_for(0, at::divup(columns, block), 4, [&](int64_t begin, int64_t end) {
    for (int64_t j0 = begin * block; j0 < std::min(end * block, columns); j0 += block) {
      for (int64_t i0 = 0; i0 < rows; i0 += block) {
        transpose_block(in + i0 * columns + j0, columns, out + j0 * rows + i0, rows, std::min(block, rows - i0),
                        std::min(block, columns - j0));
      }
    }
  });
  return target;
}

}  // namespace megatron_step
