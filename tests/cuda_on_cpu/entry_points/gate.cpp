#include "kernels/gate.cu"

using namespace tutelx::kernels;

extern "C" long gate_scratch(int64_t T, int64_t E, int64_t dtype) {
  return static_cast<long>(gate_scratch_bytes(T, E, static_cast<DType>(dtype)));
}

extern "C" int gate(const void* logits, int32_t* expert_ids, void* weights, void* score_sum, void* logsumexp,
                    void* scratch, int64_t T, int64_t E, int64_t K, int64_t score, int64_t renormalize,
                    const void* bias, int64_t groups, int64_t kept, int64_t best_of, int64_t dtype) {
  return launch_gate(logits, expert_ids, weights, score_sum, logsumexp, scratch, T, E, K, static_cast<Score>(score),
                     renormalize != 0, {bias, groups, kept, best_of}, static_cast<DType>(dtype), nullptr);
}

extern "C" int gate_backward(const void* dweights, const void* dscore_sum, const void* dlogsumexp, const void* logits,
                             const int32_t* expert_ids, const void* logsumexp, void* dlogits, int64_t T, int64_t E,
                             int64_t K, int64_t score, int64_t renormalize, int64_t dtype) {
  return launch_gate_backward(dweights, dscore_sum, dlogsumexp, logits, expert_ids, logsumexp, dlogits, T, E, K,
                              static_cast<Score>(score), renormalize != 0, static_cast<DType>(dtype), nullptr);
}
