// Every kernel's door, for callers compiled by the host compiler as well as by nvcc.
//
// All pointers are device pointers. A launch only enqueues: it allocates nothing, synchronises nothing, and can be
// captured in a graph. Sizes of zero are legal. cudaErrorInvalidValue means that the arguments cannot be served.
//
// Legend: T tokens, K choices a token, E experts, C capacity, R rows, D model dim, H expert hidden dim, N tokens or
// rows.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(TUTELX_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tutelx::kernels {

enum class DType : int { f32, f64, bf16, f16 };
enum class Score : int { softmax, sigmoid };
enum class Activation : int { silu, gelu, gelu_tanh, relu };

// ---- route ---------------------------------------------------------------------------------------------------------

struct RouteArguments {
  const int32_t* expert_ids;  // [T,K], -1: unused slot
  const int32_t* order;       // [T] or null: which token comes i-th within one choice rank
  int64_t T, K, E;
  int64_t capacity;  // kept slots an expert; negative: all of them (ragged layout only)
  bool padded;       // row = e*C + location instead of offsets[e] + location
  int32_t* dest;     // [T,K] out
  int32_t* source;   // [R] out; R = E*C (padded) or T*K (ragged)
  int32_t* counts;   // [E] out, before any drop
  int32_t* offsets;  // [E+1] out
  void* scratch;     // route_scratch_bytes(T, K, E)
};

constexpr int64_t kRouteMaxExperts = 6112;  // offsets and one histogram in 48 KiB of shared memory

size_t route_scratch_bytes(int64_t T, int64_t K, int64_t E);

// The whole map. Where the capacity follows from the counts, the two halves with the caller's decision in between:
// `count` needs the inputs, scratch and counts; `assign` needs what `count` left in scratch and counts.
cudaError_t launch_route(const RouteArguments& a, cudaStream_t stream);
cudaError_t launch_route_count(const RouteArguments& a, cudaStream_t stream);
cudaError_t launch_route_assign(const RouteArguments& a, cudaStream_t stream);

// ---- encode --------------------------------------------------------------------------------------------------------

// rows[dest[t,k]] = x[t], zeros where source is -1. `dest` and `source` must be each other's inverse.
cudaError_t launch_encode(const void* x, const int32_t* dest, const int32_t* source, void* rows, int64_t T, int64_t K,
                          int64_t R, int64_t D, DType dtype, cudaStream_t stream);

// dx[t] = sum over k of drows[dest[t,k]].
cudaError_t launch_encode_backward(const void* drows, const int32_t* dest, void* dx, int64_t T, int64_t K, int64_t R,
                                   int64_t D, DType dtype, cudaStream_t stream);

// rows[r] = zeros where source[r] is -1; the other rows are neither read nor written.
cudaError_t launch_clear_empty(void* rows, const int32_t* source, int64_t R, int64_t D, DType dtype,
                               cudaStream_t stream);

// ---- decode --------------------------------------------------------------------------------------------------------

// y[t] = sum over k of weights[t,k] * rows[dest[t,k]]. weights_dtype is f32 or dtype.
cudaError_t launch_decode(const void* rows, const int32_t* dest, const void* weights, void* y, int64_t T, int64_t K,
                          int64_t R, int64_t D, DType dtype, DType weights_dtype, cudaStream_t stream);

// drows[dest[t,k]] = weights[t,k] * dy[t], zeros where source is -1; dweights[t,k] = <dy[t], rows[dest[t,k]]>, zero
// where dest is -1. `dest` and `source` must be each other's inverse.
cudaError_t launch_decode_backward(const void* dy, const void* rows, const int32_t* dest, const int32_t* source,
                                   const void* weights, void* drows, void* dweights, int64_t T, int64_t K, int64_t R,
                                   int64_t D, DType dtype, DType weights_dtype, cudaStream_t stream);

// ---- gate ----------------------------------------------------------------------------------------------------------

constexpr int64_t kGateMaxExperts = 1024;

constexpr int64_t kGateMaxGroups = 256;

// Experts are compared by score + bias where there is a bias, else by logit. Of `groups` groups of as many experts each
// only those of the `kept` best are candidates; a group is as good as the sum of its best `best_of`, 1 or 2.
struct GateChoice {
  const void* bias;  // [E] or null
  int64_t groups, kept, best_of;
};

// bias, weights, score_sum, logsumexp and their gradients are f32, or f64 for f64 logits.
size_t gate_scratch_bytes(int64_t T, int64_t E, DType dtype);

cudaError_t launch_gate(const void* logits, int32_t* expert_ids, void* weights, void* score_sum, void* logsumexp,
                        void* scratch, int64_t T, int64_t E, int64_t K, Score score, bool renormalize,
                        const GateChoice& choice, DType dtype, cudaStream_t stream);

cudaError_t launch_gate_backward(const void* dweights, const void* dscore_sum, const void* dlogsumexp,
                                 const void* logits, const int32_t* expert_ids, const void* logsumexp, void* dlogits,
                                 int64_t T, int64_t E, int64_t K, Score score, bool renormalize, DType dtype,
                                 cudaStream_t stream);

// ---- activation ----------------------------------------------------------------------------------------------------

// out = act(gate) * up, or act(gate) where up is null. Strides count elements between rows.
struct ActivationArguments {
  const void *gate, *up;
  int64_t gate_stride, up_stride;
  int64_t N, H;
  Activation kind;
  DType dtype;
};

cudaError_t launch_activation(const ActivationArguments& a, void* out, int64_t out_stride, cudaStream_t stream);

// dup is null where up is.
cudaError_t launch_activation_backward(const ActivationArguments& a, const void* dout, int64_t dout_stride, void* dgate,
                                       int64_t dgate_stride, void* dup, int64_t dup_stride, cudaStream_t stream);

}  // namespace tutelx::kernels
