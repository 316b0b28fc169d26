// gate: scores, the k best experts of each token, and what the losses need; gate_backward.
//
// One warp a token. Lane l holds logits l, l+32, ... in registers, so a row is read once, coalesced, and everything
// about it happens between lanes.
#include <algorithm>

#include "common.cuh"

namespace tutelx::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kBlock = kWarps * kWarpSize;
constexpr int kMaxPartials = 1024;  // blocks of the first stage of score_sum

// Of the token count alone: score_sum adds up in the same order on every device.
int gate_blocks(int64_t T) { return static_cast<int>(std::min<int64_t>(ceil_div<int64_t>(T, kWarps), kMaxPartials)); }

// f64 is there for gradient checks: one kernel for every E, its rows in local memory. The others keep them in
// registers.
template <class A>
constexpr bool kInRegisters = sizeof(A) < sizeof(double);
template <class A, int kItems>
constexpr int kUnrolled = kInRegisters<A> ? kItems : 1;

// ---- Logits as integers of the same order: NaN below -inf, and below that 0 for "not a candidate" -------------------

__device__ __forceinline__ uint32_t sort_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes +0: they compare equal
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return x == x ? key : 1u;
}
__device__ __forceinline__ uint64_t sort_key(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  const uint64_t key = bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
  return x == x ? key : 1u;
}
__device__ __forceinline__ float from_key(uint32_t key) {
  return key == 1u ? NAN : __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ double from_key(uint64_t key) {
  return key == 1u ? static_cast<double>(NAN)
                   : __longlong_as_double(static_cast<long long>(key >> 63 ? key & 0x7fffffffffffffffull : ~key));
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <class A>
struct GateOutput {
  int32_t* expert_ids;  // [T,K]
  A* weights;           // [T,K]
  A* logsumexp;         // [T]
  A* partial_sums;      // [blocks,E]
};

// GateChoice, for a kernel.
template <class A>
struct Choice {
  const A* bias;
  int groups, kept, size;  // size: experts of a group
  bool two;                // whether a group is as good as its best two
};

// How experts are compared where there is a bias or groups. score_of(x): the score of a logit.
template <class A, class ScoreOf>
__device__ __forceinline__ A value_of(A logit, const Choice<A>& choice, int e, const ScoreOf& score_of) {
  return choice.bias ? score_of(logit) + choice.bias[e] : logit;
}

// Bit j: whether group lane + 32*j is one of the best; of equal ones the lower index. value_at(e): of an expert.
// goodness [groups] is the warp's own.
template <class A, class ValueAt>
__device__ __forceinline__ uint32_t keep_groups(const Choice<A>& choice, SharedPtr<A> goodness,
                                                const ValueAt& value_at) {
  const int lane = threadIdx.x % kWarpSize;
  for (int g = lane; g < choice.groups; g += kWarpSize) {
    A first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < choice.size; ++i) {
      const A value = value_at(g * choice.size + i);
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
    goodness[g] = choice.two ? first + second : first;
  }
  __syncwarp();
  uint32_t kept = 0;
  for (int g = lane, j = 0; g < choice.groups; g += kWarpSize, ++j) {
    const A mine = goodness[g];
    int better = 0;
    for (int other = 0; other < choice.groups; ++other) {
      const A theirs = goodness[other];
      better += theirs > mine || (theirs == mine && other < g);
    }
    if (better < choice.kept) kept |= 1u << j;
  }
  __syncwarp();  // before the next token overwrites goodness
  return kept;
}

// Bit i: expert lane + 32*i is no candidate. kept: of keep_groups.
template <int kItems>
__device__ __forceinline__ uint32_t outside_groups(uint32_t kept, int E, int size) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t outside = 0;
#pragma unroll 1
  for (int i = 0; i < kItems; ++i) {
    const int g = min(lane + i * kWarpSize, E - 1) / size;
    const uint32_t of_group = __shfl_sync(kAllLanes, kept, g % kWarpSize);
    if (!(of_group >> (g / kWarpSize) & 1)) outside |= 1u << i;
  }
  return outside;
}

// The K greatest values of one token, greatest first, of equal ones the lower index first. taken: bit i: value[i] is no
// candidate. score_of(e, value): an expert's.
template <class A, int kItems, class ScoreOf>
__device__ __forceinline__ void choose(const A (&value)[kItems], uint32_t taken, int E, int K, bool renormalize,
                                       const ScoreOf& score_of, int32_t* ids, A* weights) {
  using Key = decltype(sort_key(A()));
  [[maybe_unused]] constexpr int kUnroll = kUnrolled<A, kItems>;
  const int lane = threadIdx.x % kWarpSize;
  A sum = 0;
  for (int k = 0; k < K; ++k) {
    Key mine = 0;
    uint32_t mine_at = E;
#pragma unroll kUnroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane + i * kWarpSize;
      const Key key = e < E && !(taken >> i & 1) ? sort_key(value[i]) : 0;
      if (key > mine) {
        mine = key;
        mine_at = e;
      }
    }
    const Key winner = warp_max_bits(mine);
    const uint32_t e = __reduce_min_sync(kAllLanes, mine == winner ? mine_at : static_cast<uint32_t>(E));
    if (static_cast<int>(e % kWarpSize) == lane) taken |= 1u << (e / kWarpSize);
    const A score = score_of(static_cast<int>(e), from_key(winner));
    sum += score;
    if (k % kWarpSize == lane) {
      ids[k] = static_cast<int32_t>(e);
      weights[k] = score;
    }
  }
  // Every lane revisits its own writes. All scores can underflow: zeros then, not 0/0.
  if (renormalize && !(sum == 0)) {
    for (int k = lane; k < K; k += kWarpSize) weights[k] /= sum;
  }
}

// Blocks a multiprocessor, 0: as ptxas likes. With a choice it would take fewer registers than it needs and spill.
template <int kItems, bool kChoice>
constexpr int kBlocks = !kChoice       ? 0
                        : kItems <= 8  ? 8
                        : kItems <= 16 ? 5
                                       : 3;

// kChoice: whether there is a bias, or groups of which some are left out.
template <class T, int kItems, bool kChoice>
__global__ void __launch_bounds__(kBlock, (kBlocks<kItems, kChoice>))
    gate_kernel(const T* __restrict__ logits, GateOutput<Acc<T>> out, Choice<Acc<T>> choice, int64_t tokens, int E,
                int K, bool softmax, bool renormalize) {
  using A = Acc<T>;
  [[maybe_unused]] constexpr int kUnroll = kUnrolled<A, kItems>;
  TUTELX_DYNAMIC_SHARED(A, warp_sums);  // [kWarps][E], and with kChoice [kWarps][groups] of groups
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const SharedPtr<A> score_sum = warp_sums + warp * E;
  for (int e = lane; e < E; e += kWarpSize) score_sum[e] = 0;

  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp; t < tokens; t += step) {
    A logit[kItems];
    A best = -INFINITY;
#pragma unroll kUnroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane + i * kWarpSize;
      logit[i] = e < E ? widen(logits[t * E + e]) : A(-INFINITY);
      best = logit[i] > best ? logit[i] : best;
    }
    best = warp_max(best);
    if (best == INFINITY || best == -INFINITY) best = 0;  // then logsumexp is that infinity and not NaN

    A total = 0;
#pragma unroll kUnroll
    for (int i = 0; i < kItems; ++i) total += exp(logit[i] - best);
    total = warp_sum(total);
    if (lane == 0) out.logsumexp[t] = best + log(total);

    // A lane adds to its own experts only; in registers these sums would cost as many as the logits.
    const A inverse_total = A(1) / total;
#pragma unroll kUnroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane + i * kWarpSize;
      if (e < E) score_sum[e] += softmax ? exp(logit[i] - best) * inverse_total : sigmoid(logit[i]);
    }

    const auto score_of = [&](A x) { return softmax ? exp(x - best) * inverse_total : sigmoid(x); };
    int32_t* const ids = out.expert_ids + t * K;
    A* const weights = out.weights + t * K;
    if constexpr (kChoice) {
      const T* const logits_E = logits + t * E;
      uint32_t outside = 0;
      if (choice.kept < choice.groups) {
        const SharedPtr<A> goodness = warp_sums + kWarps * E + warp * choice.groups;
        const auto value_at = [&](int e) { return value_of(A(widen(logits_E[e])), choice, e, score_of); };
        outside = outside_groups<kItems>(keep_groups(choice, goodness, value_at), E, choice.size);
      }
#pragma unroll kUnroll
      for (int i = 0; i < kItems; ++i) {
        const int e = lane + i * kWarpSize;
        if (e < E) logit[i] = value_of(logit[i], choice, e, score_of);
      }
      choose(logit, outside, E, K, renormalize, [&](int e, A) { return score_of(widen(logits_E[e])); }, ids, weights);
    } else {
      choose(logit, 0u, E, K, renormalize, [&](int, A x) { return score_of(x); }, ids, weights);
    }
  }

  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kBlock) {
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += static_cast<A>(warp_sums[w * E + e]);
    out.partial_sums[static_cast<int64_t>(blockIdx.x) * E + e] = sum;
  }
}

// score_sum[e] = sum of the partial sums: 32 experts a block, the partials divided among its warps.
template <class A>
__global__ void __launch_bounds__(kBlock)
    score_sum_kernel(const A* __restrict__ partial_sums, A* __restrict__ score_sum, int partials, int E) {
  TUTELX_SHARED(A, warp_sums, kBlock);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int e = blockIdx.x * kWarpSize + lane;
  A sum = 0;
  for (int p = warp; e < E && p < partials; p += kWarps) sum += partial_sums[static_cast<int64_t>(p) * E + e];
  warp_sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || e >= E) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += static_cast<A>(warp_sums[w * kWarpSize + lane]);
  score_sum[e] = sum;
}

// ---- Backward ------------------------------------------------------------------------------------------------------

template <class A>
struct GateGradients {
  const A* dweights;          // [T,K]
  const A* dscore_sum;        // [E]
  const A* dlogsumexp;        // [T]
  const A* logsumexp;         // [T]
  const int32_t* expert_ids;  // [T,K]
};

// Adds to dscore [E] what each chosen score gets through its weight. A token's choices are distinct.
template <class T>
__device__ __forceinline__ void add_dweights(const T* logits_E, const int32_t* ids, const Acc<T>* dweights, Acc<T> lse,
                                             int E, int K, bool softmax, bool renormalize, SharedPtr<Acc<T>> dscore) {
  using A = Acc<T>;
  const int lane = threadIdx.x % kWarpSize;
  const auto score_of = [&](int32_t e) {
    const A x = widen(logits_E[e]);
    return softmax ? exp(x - lse) : sigmoid(x);
  };
  A sum = 1, mean = 0;
  if (renormalize) {
    A scores = 0, products = 0;
#pragma unroll 1  // a lane has one choice: unrolling only costs registers
    for (int k = lane; k < K; k += kWarpSize) {
      TUTELX_DEVICE_ASSERT(ids[k] >= 0 && ids[k] < E, "gate_backward: expert id outside [0, num_experts)");
      const A score = score_of(ids[k]);
      scores += score;
      products += score * dweights[k];
    }
    sum = warp_sum(scores);
    mean = warp_sum(products) / sum;
  }
#pragma unroll 1
  for (int k = lane; k < K; k += kWarpSize) {
    TUTELX_DEVICE_ASSERT(ids[k] >= 0 && ids[k] < E, "gate_backward: expert id outside [0, num_experts)");
    if (sum != 0) dscore[ids[k]] += (dweights[k] - mean) / sum;
  }
}

// 8 blocks a multiprocessor, that is 64 registers a thread: left to choose, ptxas takes fewer and spills.
template <class T, int kItems>
__global__ void __launch_bounds__(kBlock, 8)
    gate_backward_kernel(const T* __restrict__ logits, GateGradients<Acc<T>> in, T* __restrict__ dlogits,
                         int64_t tokens, int E, int K, bool softmax, bool renormalize) {
  using A = Acc<T>;
  [[maybe_unused]] constexpr int kUnroll = kUnrolled<A, kItems>;
  TUTELX_DYNAMIC_SHARED(A, memory);  // [kWarps][E]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (t >= tokens) return;  // whole warps, and no barrier of the block follows
  const SharedPtr<A> dscore = memory + warp * E;
  for (int e = lane; e < E; e += kWarpSize) dscore[e] = in.dscore_sum[e];
  __syncwarp();

  const T* logits_E = logits + t * E;
  const A lse = in.logsumexp[t], dlse = in.dlogsumexp[t];
  add_dweights(logits_E, in.expert_ids + t * K, in.dweights + t * K, lse, E, K, softmax, renormalize, dscore);
  __syncwarp();

  // With s the scores and g = dL/ds: softmax gives s*(g - <g,s>), sigmoid g*s*(1-s); logsumexp adds dlse*softmax.
  A logit[kItems];
  A dot = 0;
#pragma unroll kUnroll
  for (int i = 0; i < kItems; ++i) {
    const int e = lane + i * kWarpSize;
    logit[i] = e < E ? widen(logits_E[e]) : A(-INFINITY);
    if (softmax && e < E) dot += static_cast<A>(dscore[e]) * exp(logit[i] - lse);
  }
  if (softmax) dot = warp_sum(dot);
#pragma unroll kUnroll
  for (int i = 0; i < kItems; ++i) {
    const int e = lane + i * kWarpSize;
    if (e >= E) continue;
    const A probability = exp(logit[i] - lse), score = sigmoid(logit[i]), g = dscore[e];
    const A through_scores = softmax ? probability * (g - dot) : g * score * (A(1) - score);
    dlogits[t * E + e] = narrow<T>(through_scores + dlse * probability);
  }
}

// ---- Launch --------------------------------------------------------------------------------------------------------

bool valid(int64_t T, int64_t E, int64_t K) {
  return T >= 0 && T <= INT32_MAX && E >= 1 && E <= kGateMaxExperts && K >= 1 && K <= E;
}
bool valid(const GateChoice& c, int64_t E, int64_t K) {
  return c.groups >= 1 && c.groups <= kGateMaxGroups && E % c.groups == 0 && c.kept >= 1 && c.kept <= c.groups &&
         K <= c.kept * (E / c.groups) && (c.best_of == 1 || c.best_of == 2);
}

// Calls launch(Constant<kItems>()) with the number of logits a lane holds.
template <class A, class Launch>
cudaError_t with_items(int64_t E, const Launch& launch) {
  if constexpr (kInRegisters<A>) {
    if (E <= 1 * kWarpSize) return launch(Constant<1>());
    if (E <= 2 * kWarpSize) return launch(Constant<2>());
    if (E <= 4 * kWarpSize) return launch(Constant<4>());
    if (E <= 8 * kWarpSize) return launch(Constant<8>());
    if (E <= 16 * kWarpSize) return launch(Constant<16>());
  }
  return launch(Constant<32>());
}

}  // namespace

size_t gate_scratch_bytes(int64_t T, int64_t E, DType dtype) {
  return static_cast<size_t>(gate_blocks(T)) * E * (dtype == DType::f64 ? sizeof(double) : sizeof(float));
}

cudaError_t launch_gate(const void* logits, int32_t* expert_ids, void* weights, void* score_sum, void* logsumexp,
                        void* scratch, int64_t T, int64_t E, int64_t K, Score score, bool renormalize,
                        const GateChoice& choice, DType dtype, cudaStream_t stream) {
  if (!valid(T, E, K) || !valid(choice, E, K)) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using Element = TypeIn<decltype(type)>;
    using A = Acc<Element>;
    const int blocks = gate_blocks(T), experts = static_cast<int>(E);
    const bool plain = !choice.bias && choice.kept == choice.groups;
    const int groups = plain ? 0 : static_cast<int>(choice.groups);
    const int size = static_cast<int>(E / choice.groups);
    const Choice<A> for_kernel{static_cast<const A*>(choice.bias), groups, static_cast<int>(choice.kept), size,
                               choice.best_of == 2 && size > 1};
    if (blocks > 0) {
      const GateOutput<A> out{expert_ids, static_cast<A*>(weights), static_cast<A*>(logsumexp),
                              static_cast<A*>(scratch)};
      const cudaError_t error = with_items<A>(E, [&](auto items) {
        const auto launch = [&](auto limited) {
          TUTELX_LAUNCH((gate_kernel<Element, decltype(items)::value, decltype(limited)::value>), blocks, kBlock,
                        kWarps * (E + groups) * sizeof(A), stream)
          (static_cast<const Element*>(logits), out, for_kernel, T, experts, static_cast<int>(K),
           score == Score::softmax, renormalize);
          return cudaGetLastError();
        };
        return plain ? launch(Constant<0>()) : launch(Constant<1>());
      });
      if (error != cudaSuccess) return error;
    }
    TUTELX_LAUNCH((score_sum_kernel<A>), ceil_div(experts, kWarpSize), kBlock, 0, stream)
    (static_cast<const A*>(scratch), static_cast<A*>(score_sum), blocks, experts);
    return cudaGetLastError();
  });
}

cudaError_t launch_gate_backward(const void* dweights, const void* dscore_sum, const void* dlogsumexp,
                                 const void* logits, const int32_t* expert_ids, const void* logsumexp, void* dlogits,
                                 int64_t T, int64_t E, int64_t K, Score score, bool renormalize, DType dtype,
                                 cudaStream_t stream) {
  if (!valid(T, E, K)) return cudaErrorInvalidValue;
  if (T == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using Element = TypeIn<decltype(type)>;
    using A = Acc<Element>;
    const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(T, kWarps));
    const GateGradients<A> in{static_cast<const A*>(dweights), static_cast<const A*>(dscore_sum),
                              static_cast<const A*>(dlogsumexp), static_cast<const A*>(logsumexp), expert_ids};
    return with_items<A>(E, [&](auto items) {
      TUTELX_LAUNCH((gate_backward_kernel<Element, decltype(items)::value>), blocks, kBlock, kWarps * E * sizeof(A),
                    stream)
      (static_cast<const Element*>(logits), in, static_cast<Element*>(dlogits), T, static_cast<int>(E),
       static_cast<int>(K), score == Score::softmax, renormalize);
      return cudaGetLastError();
    });
  });
}

}  // namespace tutelx::kernels
