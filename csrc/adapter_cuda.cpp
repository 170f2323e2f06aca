// The adapter's kernels as torch operators on CUDA tensors: checks, memory for results, choice of the type. This file is
// compiled if the extension is built for CUDA. The tests compile it with the emulated kernels, for CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "adapter_kernels.h"

#ifdef MEGATRON_STEP_EMULATION
#define MEGATRON_STEP_DEVICE CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MEGATRON_STEP_DEVICE CUDA
#endif

namespace megatron_step {
namespace {

using at::Tensor;

// Makes a tensor's device the current device, and returns its stream.
class OnDevice {
#ifdef MEGATRON_STEP_EMULATION
 public:
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
#else
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

struct Operand {
  const char* name;
  const Tensor& tensor;
  at::ScalarType dtype;
};

// Kernels read raw memory, so their arguments must be matrices of the right type, on one device, without gaps.
void check(const char* operation, std::initializer_list<Operand> operands) {
  const Tensor& first = operands.begin()->tensor;
  for (const auto& [name, tensor, dtype] : operands) {
    TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), operation, ": ", name,
                " must be a matrix without gaps, not of shape ", tensor.sizes(), " and strides ", tensor.strides());
    TORCH_CHECK(tensor.scalar_type() == dtype, operation, ": ", name, " must be ", dtype, ", not ",
                tensor.scalar_type());
    TORCH_CHECK(tensor.device() == first.device(), operation, ": ", name, " is on ", tensor.device(), ", ",
                operands.begin()->name, " on ", first.device());
  }
}

template <typename Function>
void with_type(const char* operation, at::ScalarType dtype, Function f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(at::BFloat16{});
    case at::kHalf: return f(at::Half{});
    default: TORCH_CHECK(false, operation, ": takes float32, bfloat16 or float16, not ", dtype);
  }
}

Factor layout_of(bool rank_first) { return rank_first ? Factor::kRankFirst : Factor::kRankLast; }

Tensor new_parts(const Tensor& like, int64_t parts, int64_t rows, int64_t columns) {
  return at::empty({parts, rows, columns}, like.options().dtype(at::kFloat));
}

// The sum of the parts, always in the same order.
Tensor add_up(const Tensor& parts) { return parts.size(0) == 1 ? parts[0] : at::sum(parts, 0); }

Tensor shrink(const Tensor& x, const Tensor& factor, bool rank_first, double scaling, const Dropout& dropout) {
  const int64_t tokens = x.size(0), columns = x.size(1), rank = factor.size(rank_first ? 0 : 1);
  const int64_t part = part_length(columns, divide_up(tokens, kTile));
  const Tensor parts = new_parts(x, part_count(columns, part), tokens, rank);
  if (parts.numel() > 0) {
    with_type("adapter_shrink", x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      adapter_shrink(x.const_data_ptr<T>(), factor.const_data_ptr<T>(), layout_of(rank_first),
                     parts.mutable_data_ptr<float>(), tokens, columns, rank, part, static_cast<float>(scaling), dropout,
                     OnDevice(x).stream());
    });
  }
  return add_up(parts);
}

Tensor factor_gradient(const Tensor& u, const Tensor& x, bool rank_first, double scaling, const Dropout& dropout) {
  const int64_t tokens = x.size(0), columns = x.size(1), rank = u.size(1);
  const int64_t part = part_length(tokens, divide_up(columns, kTile));
  const Tensor parts =
      new_parts(x, part_count(tokens, part), rank_first ? rank : columns, rank_first ? columns : rank);
  if (parts.numel() > 0) {
    with_type("adapter_factor_gradient", x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      adapter_factor_gradient(u.const_data_ptr<float>(), x.const_data_ptr<T>(), layout_of(rank_first),
                              parts.mutable_data_ptr<float>(), tokens, columns, rank, part,
                              static_cast<float>(scaling), dropout, OnDevice(x).stream());
    });
  }
  return add_up(parts);
}

// du and dB of 16-bit types in one pass.
std::tuple<Tensor, Tensor> gradients_in_one_pass(const Tensor& dy, const Tensor& u, const Tensor& b, double scaling) {
  const int64_t tokens = dy.size(0), columns = dy.size(1), rank = b.size(1);
  const int64_t column_blocks = divide_up(columns, kGradientColumns);
  const int64_t part = part_length(tokens, column_blocks);
  const Tensor du_parts = new_parts(dy, column_blocks, tokens, rank);
  const Tensor db_parts = new_parts(dy, part_count(tokens, part), columns, rank);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    adapter_output_gradients(dy.const_data_ptr<T>(), u.const_data_ptr<float>(), b.const_data_ptr<T>(),
                             du_parts.mutable_data_ptr<float>(), db_parts.mutable_data_ptr<float>(), tokens, columns,
                             rank, part, static_cast<float>(scaling), OnDevice(dy).stream());
  };
  dy.scalar_type() == at::kHalf ? run(at::Half{}) : run(at::BFloat16{});
  return {add_up(du_parts), add_up(db_parts)};
}

}  // namespace

// u = drop(x) Aᵀ: x [t, k], a [r, k] -> float [t, r]
Tensor adapter_shrink_op(const Tensor& x, const Tensor& a, double probability, int64_t seed, int64_t first_index,
                         int64_t row_stride) {
  check("adapter_shrink", {{"x", x, x.scalar_type()}, {"a", a, x.scalar_type()}});
  TORCH_CHECK(x.size(1) == a.size(1), "adapter_shrink: x ", x.sizes(), " and a ", a.sizes(), " differ in columns");
  return shrink(x, a, true, 1.0, Dropout(probability, seed, first_index, row_stride));
}

// s u Bᵀ for b [n, r], or if the rank comes first mask * s (u A) for a [r, k]: u float [t, r] -> [t, n] or [t, k]
Tensor adapter_expand_op(const Tensor& u, const Tensor& factor, bool rank_first, double scaling, double probability,
                         int64_t seed, int64_t first_index, int64_t row_stride) {
  check("adapter_expand", {{"u", u, at::kFloat}, {"factor", factor, factor.scalar_type()}});
  const int64_t tokens = u.size(0), rank = u.size(1), columns = factor.size(rank_first ? 1 : 0);
  TORCH_CHECK(rank == factor.size(rank_first ? 0 : 1), "adapter_expand: u ", u.sizes(), " and factor ", factor.sizes(),
              " differ in rank");
  const Tensor y = at::empty({tokens, columns}, factor.options());
  if (y.numel() > 0) {
    const Dropout dropout(probability, seed, first_index, row_stride);
    with_type("adapter_expand", factor.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      adapter_expand(u.const_data_ptr<float>(), factor.const_data_ptr<T>(), layout_of(rank_first),
                     y.mutable_data_ptr<T>(), tokens, columns, rank, static_cast<float>(scaling), dropout,
                     OnDevice(u).stream());
    });
  }
  return y;
}

// du = s dy B, and dB = s dyᵀ u where u is given: dy [t, n], u float [t, r], b [n, r] -> float [t, r] and [n, r]
std::tuple<Tensor, Tensor> adapter_output_gradients_op(const Tensor& dy, const std::optional<Tensor>& u,
                                                       const Tensor& b, double scaling) {
  check("adapter_output_gradients", {{"dy", dy, dy.scalar_type()}, {"b", b, dy.scalar_type()}});
  TORCH_CHECK(dy.size(1) == b.size(0), "adapter_output_gradients: dy ", dy.sizes(), " and b ", b.sizes(),
              " differ in outputs");
  const Dropout none(0.0, 0, 0, 0);
  if (!u.has_value()) {
    return {shrink(dy, b, false, scaling, none), at::empty({0}, b.options().dtype(at::kFloat))};
  }
  check("adapter_output_gradients", {{"dy", dy, dy.scalar_type()}, {"u", *u, at::kFloat}});
  TORCH_CHECK(u->size(0) == dy.size(0) && u->size(1) == b.size(1), "adapter_output_gradients: u ", u->sizes(),
              " does not fit dy ", dy.sizes(), " and b ", b.sizes());
  if (dy.element_size() == 2 && b.size(1) <= kGradientRank && dy.numel() > 0) {
    return gradients_in_one_pass(dy, *u, b, scaling);
  }
  return {shrink(dy, b, false, scaling, none), factor_gradient(*u, dy, false, scaling, none)};
}

// dA = duᵀ drop(x): du float [t, r], x [t, k] -> float [r, k]
Tensor adapter_shrink_gradient_op(const Tensor& du, const Tensor& x, double probability, int64_t seed,
                                  int64_t first_index, int64_t row_stride) {
  check("adapter_shrink_gradient", {{"du", du, at::kFloat}, {"x", x, x.scalar_type()}});
  TORCH_CHECK(du.size(0) == x.size(0), "adapter_shrink_gradient: du ", du.sizes(), " and x ", x.sizes(),
              " differ in tokens");
  return factor_gradient(du, x, true, 1.0, Dropout(probability, seed, first_index, row_stride));
}

}  // namespace megatron_step

TORCH_LIBRARY_IMPL(megatron_step, MEGATRON_STEP_DEVICE, m) {
  m.impl("adapter_shrink", &megatron_step::adapter_shrink_op);
  m.impl("adapter_expand", &megatron_step::adapter_expand_op);
  m.impl("adapter_output_gradients", &megatron_step::adapter_output_gradients_op);
  m.impl("adapter_shrink_gradient", &megatron_step::adapter_shrink_gradient_op);
}
