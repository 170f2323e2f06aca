// Rotary position embedding (Su et al., 2021), halves convention, x [s, b, n, d] with cos and sin [s, d] in fp32:
//     y[:d/2] = x[:d/2] * cos[:d/2] - x[d/2:] * sin[:d/2]
//     y[d/2:] = x[d/2:] * cos[d/2:] + x[:d/2] * sin[d/2:]
// Backward is the transposed map. `split_qkv_rotary` rotates q and k while it splits Megatron's fused projection
// qkv [s, b, groups * (queries_per_group + 2) * d] into q, k and v. Each group holds its queries, then a key, then a value.
// The backward function of the split writes one gradient, that of qkv.
#include "operations.h"

namespace megatron_step {
namespace {

template <typename scalar_t>
void rotate(const scalar_t* x, const float* cos, const float* sin, scalar_t* y, int64_t d, bool transposed) {
  const int64_t half = d / 2;
  // The transposed map takes sin from the other half and with the other sign.
  const float* sin_first = transposed ? sin + half : sin;
  const float* sin_second = transposed ? sin : sin + half;
  const float sign = transposed ? -1.0f : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = to_float(x[i]), second = to_float(x[half + i]);
    y[i] = from_float<scalar_t>(first * cos[i] - sign * second * sin_first[i]);
    y[half + i] = from_float<scalar_t>(second * cos[half + i] + sign * first * sin_second[i]);
  }
}

// One token's fused projection and the q, k and v in it, all contiguous. `fused_t` is const in the forward direction.
template <typename fused_t, typename part_t, typename Rotate, typename Copy>
void for_each_head(fused_t* qkv, part_t* q, part_t* k, part_t* v, int64_t groups, int64_t queries_per_group, int64_t d,
                   const Rotate& rotate_head, const Copy& copy_head) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t i = 0; i < queries_per_group; ++i, qkv += d, q += d) {
      rotate_head(qkv, q);
    }
    rotate_head(qkv, k + group * d);
    copy_head(qkv + d, v + group * d);
    qkv += 2 * d;
  }
}

}  // namespace

at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed) {
  const at::Tensor input = x.stride(-1) == 1 ? x : x.contiguous();
  const int64_t s = input.size(0), b = input.size(1), n = input.size(2), d = input.size(3);
  at::Tensor y = at::empty(input.sizes(), input.options());
  const float* cosine = cos.const_data_ptr<float>();
  const float* sine = sin.const_data_ptr<float>();
  MEGATRON_STEP_DISPATCH(input, "rotary", [&] {
    at::parallel_for(0, s * b, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t position = token / b;
        const scalar_t* source =
            input.const_data_ptr<scalar_t>() + position * input.stride(0) + token % b * input.stride(1);
        scalar_t* target = y.mutable_data_ptr<scalar_t>() + token * n * d;
        for (int64_t head = 0; head < n; ++head) {
          rotate(source + head * input.stride(2), cosine + position * d, sine + position * d, target + head * d, d,
                 transposed);
        }
      }
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> split_qkv_rotary_forward(const at::Tensor& qkv, const at::Tensor& cos,
                                                                        const at::Tensor& sin, int64_t heads,
                                                                        int64_t groups) {
  const at::Tensor fused = qkv.contiguous();
  const int64_t s = fused.size(0), b = fused.size(1), d = fused.size(2) / (heads + 2 * groups);
  at::Tensor q = at::empty({s, b, heads, d}, fused.options());
  at::Tensor k = at::empty({s, b, groups, d}, fused.options());
  at::Tensor v = at::empty({s, b, groups, d}, fused.options());
  MEGATRON_STEP_DISPATCH(fused, "split_qkv_rotary", [&] {
    at::parallel_for(0, s * b, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* cosine = cos.const_data_ptr<float>() + token / b * d;
        const float* sine = sin.const_data_ptr<float>() + token / b * d;
        for_each_head(
            fused.const_data_ptr<scalar_t>() + token * fused.size(2), q.mutable_data_ptr<scalar_t>() + token * heads * d,
            k.mutable_data_ptr<scalar_t>() + token * groups * d, v.mutable_data_ptr<scalar_t>() + token * groups * d,
            groups, heads / groups, d,
            [&](const scalar_t* from, scalar_t* to) { rotate(from, cosine, sine, to, d, false); },
            [&](const scalar_t* from, scalar_t* to) { std::copy_n(from, d, to); });
      }
    });
  });
  return {q, k, v};
}

at::Tensor split_qkv_rotary_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                                     const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor q = dq.contiguous(), k = dk.contiguous(), v = dv.contiguous();
  const int64_t s = q.size(0), b = q.size(1), heads = q.size(2), groups = k.size(2), d = q.size(3);
  const int64_t width = (heads + 2 * groups) * d;
  at::Tensor fused = at::empty({s, b, width}, q.options());
  MEGATRON_STEP_DISPATCH(fused, "split_qkv_rotary", [&] {
    at::parallel_for(0, s * b, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* cosine = cos.const_data_ptr<float>() + token / b * d;
        const float* sine = sin.const_data_ptr<float>() + token / b * d;
        for_each_head(
            fused.mutable_data_ptr<scalar_t>() + token * width, q.const_data_ptr<scalar_t>() + token * heads * d,
            k.const_data_ptr<scalar_t>() + token * groups * d, v.const_data_ptr<scalar_t>() + token * groups * d, groups,
            heads / groups, d,
            [&](scalar_t* to, const scalar_t* from) { rotate(from, cosine, sine, to, d, true); },
            [&](scalar_t* to, const scalar_t* from) { std::copy_n(from, d, to); });
      }
    });
  });
  return fused;
}

}  // namespace megatron_step
