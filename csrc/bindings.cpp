// Registers the operations with torch as torch.ops.megatron_step.*, with their kernels for the CPU. adapter_cuda.cpp has the
// kernels for CUDA. Shapes are checked by megatron_step/ops.
#include <Python.h>
#include <torch/library.h>

#include "operations.h"

TORCH_LIBRARY(megatron_step, m) {
  m.def("adapter_dropout(Tensor x, float probability, int seed, int first_index, int row_stride) -> Tensor");
  m.def("adapter_shrink(Tensor x, Tensor a, float probability, int seed, int first_index, int row_stride) -> Tensor");
  m.def(
      "adapter_expand(Tensor u, Tensor factor, bool rank_first, float scaling, float probability, int seed, "
      "int first_index, int row_stride) -> Tensor");
  m.def("adapter_output_gradients(Tensor dy, Tensor? u, Tensor b, float scaling) -> (Tensor, Tensor)");
  m.def(
      "adapter_shrink_gradient(Tensor du, Tensor x, float probability, int seed, int first_index, int row_stride) -> "
      "Tensor");
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, float scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "compact_adamw_(Tensor(a!) weight, Tensor gradient, Tensor(b!)? remainder, Tensor(c!) first, Tensor(d!) second, "
      "Tensor(e!)? first_scale, Tensor(f!)? second_scale, Tensor? peaks, float gradient_factor, float decay, float beta1, "
      "float beta2, float root_factor, float eps, float step_size, int seed, int first_index, int row_stride, int first_column) -> "
      "()");
  m.def(
      "compact_adamw_peaks(Tensor gradient, Tensor first, Tensor second, Tensor? first_scale, Tensor? second_scale, "
      "float gradient_factor, float beta1, float beta2, int first_column) -> Tensor");
  m.def("cross_entropy_forward(Tensor logits, Tensor labels, int columns) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor maximum, Tensor total, Tensor gradient, int columns) "
      "-> ()");
  m.def("join_main(Tensor weight, Tensor remainder, Tensor(a!) second) -> Tensor");
  m.def("narrow_products(Tensor x, Tensor left, Tensor right, float scaling) -> (Tensor, Tensor)");
  m.def("rank_update_(Tensor(a!) target, Tensor u, Tensor factor, float scaling) -> ()");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_dx, bool need_dweight) -> "
      "(Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor");
  m.def(
      "split_qkv_rotary_forward(Tensor qkv, Tensor cos, Tensor sin, int heads, int groups) -> (Tensor, Tensor, Tensor)");
  m.def("split_qkv_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor");
  m.def("split_main_(Tensor main, Tensor(a!) weight, Tensor(b!) remainder, Tensor(c!) second) -> ()");
  m.def("swiglu_forward(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x) -> Tensor");
  m.def("transpose(Tensor matrix) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_step, CPU, m) {
  m.impl("adapter_dropout", &megatron_step::adapter_dropout);
  m.impl("attention_forward", &megatron_step::attention_forward);
  m.impl("attention_backward", &megatron_step::attention_backward);
  m.impl("compact_adamw_", &megatron_step::compact_adamw_);
  m.impl("compact_adamw_peaks", &megatron_step::compact_adamw_peaks);
  m.impl("cross_entropy_forward", &megatron_step::cross_entropy_forward);
  m.impl("cross_entropy_backward_", &megatron_step::cross_entropy_backward_);
  m.impl("join_main", &megatron_step::join_main);
  m.impl("narrow_products", &megatron_step::narrow_products);
  m.impl("rank_update_", &megatron_step::rank_update_);
  m.impl("rms_norm_forward", &megatron_step::rms_norm_forward);
  m.impl("rms_norm_backward", &megatron_step::rms_norm_backward);
  m.impl("rotary", &megatron_step::rotary);
  m.impl("split_qkv_rotary_forward", &megatron_step::split_qkv_rotary_forward);
  m.impl("split_qkv_rotary_backward", &megatron_step::split_qkv_rotary_backward);
  m.impl("split_main_", &megatron_step::split_main_);
  m.impl("swiglu_forward", &megatron_step::swiglu_forward);
  m.impl("swiglu_backward", &megatron_step::swiglu_backward);
  m.impl("transpose", &megatron_step::transpose);
}

// An empty Python module: importing it loads this library, which runs the registrations above.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
