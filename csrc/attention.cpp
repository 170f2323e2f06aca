// Causal self-attention without the [s, s] matrix in memory (Dao, 2023), for q [s, b, n, d] and k, v [s, b, g, d].
// Query head i of n reads group i / (n / g) of keys and values:
//     S = scale * q k^T (keys after the query masked)     P = softmax(S)     out = P v
// Forward walks over blocks of keys and keeps, for every query, a running maximum m and sum l. It returns
// out [s, b, n, d] and logsumexp = m + log l [b, n, s]. Backward recomputes P = exp(S - logsumexp). With
// delta = sum_d dout * out, the gradients are
//     dv = P^T dout      dS = P * (dout v^T - delta)      dq = scale * dS k      dk = scale * dS^T q
// One thread computes a whole query head (forward) or a whole key/value group (backward), so no sum depends on the number
// of threads. Blocks are copied to fp32 and padded with zeros (attention_blocks.h). A padded key is masked, because it
// comes after every query. A padded query has logsumexp = infinity, so its P is 0.
#include "attention_blocks.h"

namespace megatron_step {
namespace {

typedef int32_t IntegerVector __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

// combine(...combine(x[0], x[1])..., x[lanes - 1]), in a tree order.
template <typename Combine>
inline float across_lanes(Vector x, Combine combine) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &x, sizeof(x));
  for (int64_t i = 1; i < kLanes / 4; ++i) {
    quads[0] = combine(quads[0], quads[i]);
  }
  return combine(combine(quads[0][0], quads[0][1]), combine(quads[0][2], quads[0][3]));
}

// e^x like `exponential`, but only for x < 88, where one power of two is enough.
inline Vector exponential_below_88(Vector x) {
  constexpr float low = -87.33654f;
  const Vector clamped = x < low ? low : x;
  Vector n;
  const Vector p = exponential_of_remainder(clamped, n);
  const IntegerVector power_bits = (__builtin_convertvector(n, IntegerVector) + 127) << 23;
  return x < low ? Vector{} : p * reinterpret_cast<Vector>(power_bits);
}

// Running softmax over one block of scores [kQueries, :columns]: scores become exp(scores - m), out is rescaled. A masked
// score is -infinity, so that loops run over whole vectors. No query of a block precedes the block's first key.
void softmax_block(float* scores, float* maximum, float* sum, float* out, const Shape& shape, int64_t query0,
                   int64_t key0, int64_t columns, float scale) {
  float highest[kQueries];  // computed first for all rows, so that exponentials need not wait
  for (int64_t i = 0; i < kQueries; ++i) {
    float* row = scores + i * kKeys;
    std::fill(row + std::min(query0 + i + 1 - key0, columns), row + columns, -HUGE_VALF);
    Vector largest = Vector{} + maximum[i];
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vector score = scale * load(row + j);
      store(row + j, score);
      largest = score > largest ? score : largest;
    }
    highest[i] = across_lanes(largest, [](auto x, auto y) { return x > y ? x : y; });
  }
  for (int64_t i = 0; i < kQueries; ++i) {
    float* row = scores + i * kKeys;
    Vector block_sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vector p = exponential_below_88(load(row + j) - highest[i]);
      store(row + j, p);
      block_sum += p;
    }
    const float correction = exponential(maximum[i] - highest[i]);
    maximum[i] = highest[i];
    sum[i] = sum[i] * correction + across_lanes(block_sum, [](auto x, auto y) { return x + y; });
    if (correction != 1.0f) {
      for (float* target = out + i * shape.width; target < out + (i + 1) * shape.width; target += kLanes) {
        store(target, correction * load(target));
      }
    }
  }
}

// P = exp(scale * scores - logsumexp) in place of the scores, dS = P * (dP - delta) in place of dP; both 0 where masked.
void softmax_gradient_block(float* scores, float* dscores, const float* logsumexp, const float* delta, int64_t query0,
                            int64_t key0, int64_t columns, float scale) {
  for (int64_t i = 0; i < kQueries; ++i) {
    float* p = scores + i * kKeys;
    float* ds = dscores + i * kKeys;
    for (int64_t j = 0; j < columns; j += kLanes) {  // also masked scores, to use whole vectors
      const Vector probability = exponential_below_88(scale * load(p + j) - logsumexp[i]);
      store(p + j, probability);
      store(ds + j, probability * (load(ds + j) - delta[i]));
    }
    const int64_t keys = std::min(query0 + i + 1 - key0, columns);
    std::fill(p + keys, p + columns, 0.0f);
    std::fill(ds + keys, ds + columns, 0.0f);
  }
}

// Buffers of a thread in forward. Keys and values stay in the buffers for all query heads of a group.
struct ForwardBuffers {
  Buffer keys, keys_t, values, queries, sums, scores;
  explicit ForwardBuffers(const Shape& shape)
      : keys(shape.s_padded * shape.width), keys_t(shape.s_padded * shape.width), values(shape.s_padded * shape.width),
        queries(kQueries * shape.width), sums(kQueries * shape.width), scores(kQueries * kKeys) {}

  template <typename scalar_t>
  void load(const KeysAndValues<scalar_t>& group, const Shape& shape) {
    copy_rows(group.keys, 0, shape.s, shape.s_padded, shape.d, shape.width, keys.data());
    transpose_rows(keys.data(), shape, keys_t.data());
    copy_rows(group.values, 0, shape.s, shape.s_padded, shape.d, shape.width, values.data());
  }
};

// `next` is the group that this thread reads after this head, if that is another group.
template <typename scalar_t>
void forward_head(const Head<const scalar_t>& q, const Head<scalar_t>& out, float* logsumexp, ForwardBuffers& buffer,
                  const Shape& shape, float scale, const std::optional<KeysAndValues<scalar_t>>& next) {
  const int64_t w = shape.width;
  float* scores = buffer.scores.data();
  float* sums = buffer.sums.data();
  for (int64_t query0 = 0; query0 < shape.s; query0 += kQueries) {
    const int64_t rows = std::min(kQueries, shape.s - query0);
    float maximum[kQueries], sum[kQueries] = {};
    std::fill_n(maximum, kQueries, -HUGE_VALF);
    buffer.sums.clear();
    copy_rows(q, query0, rows, kQueries, shape.d, w, buffer.queries.data());
    prefetch_block({&q}, next, query0, shape);
    for (int64_t key0 = 0; key0 < query0 + rows; key0 += kKeys) {
      const int64_t used = std::min(kKeys, round_up(query0 + kQueries - key0, kQueries));
      multiply(buffer.queries.data(), w, 1, buffer.keys_t.data() + key0, shape.s_padded, scores, kKeys, kQueries, used,
               w, false);
      softmax_block(scores, maximum, sum, sums, shape, query0, key0, used, scale);
      multiply(scores, kKeys, 1, buffer.values.data() + key0 * w, w, sums, w, kQueries, w, used, true);
    }
    for (int64_t i = 0; i < rows; ++i) {
      logsumexp[query0 + i] = maximum[i] + std::log(sum[i]);
      store_rows(sums + i * w, 1, shape.d, w, 1.0f / sum[i], out, query0 + i);
    }
  }
}

// Buffers of one key/value group in backward, reused for each of its query heads.
struct BackwardBuffers {
  Buffer keys, keys_t, values, values_t, dkeys, dvalues, queries, dout, dqueries, scores, dscores;
  explicit BackwardBuffers(const Shape& shape)
      : keys(shape.s_padded * shape.width), keys_t(shape.s_padded * shape.width), values(shape.s_padded * shape.width),
        values_t(shape.s_padded * shape.width), dkeys(shape.s_padded * shape.width),
        dvalues(shape.s_padded * shape.width), queries(kQueries * shape.width), dout(kQueries * shape.width),
        dqueries(kQueries * shape.width), scores(kQueries * kKeys), dscores(kQueries * kKeys) {}

  template <typename scalar_t>
  void load(const KeysAndValues<scalar_t>& group, const Shape& shape) {
    copy_rows(group.keys, 0, shape.s, shape.s_padded, shape.d, shape.width, keys.data());
    copy_rows(group.values, 0, shape.s, shape.s_padded, shape.d, shape.width, values.data());
    transpose_rows(keys.data(), shape, keys_t.data());
    transpose_rows(values.data(), shape, values_t.data());
    dkeys.clear();
    dvalues.clear();
  }
};

// `next` is the group that this thread reads after this head, if that is another group.
template <typename scalar_t>
void backward_head(const Head<const scalar_t>& dout, const Head<const scalar_t>& q, const Head<const scalar_t>& out,
                   const float* logsumexp, const Head<scalar_t>& dq, BackwardBuffers& buffer, const Shape& shape,
                   float scale, const std::optional<KeysAndValues<scalar_t>>& next) {
  const int64_t w = shape.width;
  for (int64_t query0 = 0; query0 < shape.s; query0 += kQueries) {
    const int64_t rows = std::min(kQueries, shape.s - query0);
    float shift[kQueries], delta[kQueries] = {};
    std::fill_n(shift, kQueries, HUGE_VALF);
    std::copy_n(logsumexp + query0, rows, shift);
    copy_rows(out, query0, rows, kQueries, shape.d, w, buffer.dqueries.data());
    copy_rows(dout, query0, rows, kQueries, shape.d, w, buffer.dout.data());
    copy_rows(q, query0, rows, kQueries, shape.d, w, buffer.queries.data());
    for (int64_t i = 0; i < rows; ++i) {
      delta[i] = dot(buffer.dout.data() + i * w, buffer.dqueries.data() + i * w, w);
    }
    buffer.dqueries.clear();
    prefetch_block({&out, &dout, &q}, next, query0, shape);
    for (int64_t key0 = 0; key0 < query0 + rows; key0 += kKeys) {
      const int64_t used = std::min(kKeys, round_up(query0 + kQueries - key0, kQueries));
      float* scores = buffer.scores.data();
      float* dscores = buffer.dscores.data();
      multiply(buffer.queries.data(), w, 1, buffer.keys_t.data() + key0, shape.s_padded, scores, kKeys, kQueries, used,
               w, false);
      multiply(buffer.dout.data(), w, 1, buffer.values_t.data() + key0, shape.s_padded, dscores, kKeys, kQueries, used,
               w, false);
      softmax_gradient_block(scores, dscores, shift, delta, query0, key0, used, scale);
      multiply(dscores, kKeys, 1, buffer.keys.data() + key0 * w, w, buffer.dqueries.data(), w, kQueries, w, used, true);
      multiply(dscores, 1, kKeys, buffer.queries.data(), w, buffer.dkeys.data() + key0 * w, w, used, w, kQueries, true);
      multiply(scores, 1, kKeys, buffer.dout.data(), w, buffer.dvalues.data() + key0 * w, w, used, w, kQueries, true);
    }
    store_rows(buffer.dqueries.data(), rows, shape.d, w, scale, dq, query0);
  }
}

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q_in, const at::Tensor& k_in,
                                                     const at::Tensor& v_in, double scale) {
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t s = q.size(0), b = q.size(1), n = q.size(2), per_group = n / k.size(2);
  const Shape shape(s, q.size(3));
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor logsumexp = at::empty({b, n, s}, q.options().dtype(at::kFloat));
  MEGATRON_STEP_DISPATCH(q, "attention", [&] {
    using Group = KeysAndValues<scalar_t>;
    at::parallel_for(0, b * n, 1, [&](int64_t begin, int64_t end) {
      ForwardBuffers buffer(shape);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / n, head = task % n, following = task + 1;
        if (task == begin || task % per_group == 0) {
          buffer.load(Group(k, v, task / per_group), shape);
        }
        const bool is_last_of_group = following % per_group == 0 && following < end;
        forward_head(Head<const scalar_t>(q, q.const_data_ptr<scalar_t>(), batch, head),
                     Head<scalar_t>(out, out.mutable_data_ptr<scalar_t>(), batch, head),
                     logsumexp.mutable_data_ptr<float>() + task * s, buffer, shape, static_cast<float>(scale),
                     is_last_of_group ? std::optional(Group(k, v, following / per_group)) : std::nullopt);
      }
    });
  });
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& dout_in, const at::Tensor& q_in,
                                                                  const at::Tensor& k_in, const at::Tensor& v_in,
                                                                  const at::Tensor& out, const at::Tensor& logsumexp,
                                                                  double scale) {
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const at::Tensor dout = with_contiguous_rows(dout_in);
  const int64_t s = q.size(0), b = q.size(1), n = q.size(2), groups = k.size(2), per_group = n / groups;
  const Shape shape(s, q.size(3));
  at::Tensor dq = at::empty(q.sizes(), q.options());
  at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  MEGATRON_STEP_DISPATCH(q, "attention", [&] {
    using Input = Head<const scalar_t>;
    using Output = Head<scalar_t>;
    using Group = KeysAndValues<scalar_t>;
    at::parallel_for(0, b * groups, 1, [&](int64_t begin, int64_t end) {
      BackwardBuffers buffer(shape);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / groups, group = task % groups, w = shape.width;
        const int64_t end_head = (group + 1) * per_group;
        buffer.load(Group(k, v, task), shape);
        for (int64_t head = group * per_group; head < end_head; ++head) {
          const bool is_last_of_group = head + 1 == end_head && task + 1 < end;
          backward_head(Input(dout, dout.const_data_ptr<scalar_t>(), batch, head),
                        Input(q, q.const_data_ptr<scalar_t>(), batch, head),
                        Input(out, out.const_data_ptr<scalar_t>(), batch, head),
                        logsumexp.const_data_ptr<float>() + (batch * n + head) * s,
                        Output(dq, dq.mutable_data_ptr<scalar_t>(), batch, head), buffer, shape,
                        static_cast<float>(scale),
                        is_last_of_group ? std::optional(Group(k, v, task + 1)) : std::nullopt);
        }
        store_rows(buffer.dkeys.data(), s, shape.d, w, static_cast<float>(scale),
                   Output(dk, dk.mutable_data_ptr<scalar_t>(), batch, group), 0);
        store_rows(buffer.dvalues.data(), s, shape.d, w, 1.0f,
                   Output(dv, dv.mutable_data_ptr<scalar_t>(), batch, group), 0);
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace megatron_step
