// The door for operators: every schema of the `tutelx` namespace, and nothing else.
// Implementations register themselves per device (csrc/cpu, csrc/cuda); fake and autograd live in tutelx/ops.
//
// Legend: T tokens, K choices a token, E experts, R rows, D model dim, H expert hidden dim.
#include <torch/library.h>

TORCH_LIBRARY(tutelx, m) {
  // logits [T,E], bias [E] -> expert_ids [T,K] i32, weights [T,K], score_sum [E], logsumexp [T]
  m.def(
      "gate(Tensor logits, int k, str score, bool renormalize, Tensor? bias=None, int num_groups=1, "
      "int kept_groups=1, int best_of_group=1) "
      "-> (Tensor expert_ids, Tensor weights, Tensor score_sum, Tensor logsumexp)");
  m.def(
      "gate_backward(Tensor grad_weights, Tensor grad_score_sum, Tensor grad_logsumexp, Tensor logits, "
      "Tensor expert_ids, Tensor logsumexp, str score, bool renormalize) -> Tensor");

  // x [T,I], weight [O,I] -> [T,O], for few tokens and no gradient
  m.def("linear(Tensor x, Tensor weight) -> Tensor");

  // expert_ids [T,K] i32 -> dest [T,K] i32, source [R] i32, counts [E] i32 (before drops), offsets [E+1] i32
  m.def(
      "route(Tensor expert_ids, int num_experts, int? capacity, bool padded, Tensor? order) "
      "-> (Tensor dest, Tensor source, Tensor counts, Tensor offsets)");

  // x [T,D] -> rows [R,D], and its mirror
  m.def("encode(Tensor x, Tensor source, Tensor dest) -> Tensor");
  m.def("encode_backward(Tensor grad_rows, Tensor dest) -> Tensor");

  // rows [R,D]: those that no slot fills become zeros, in place
  m.def("clear_empty(Tensor(a!) rows, Tensor source) -> ()");

  // rows [R,D], weights [T,K] -> y [T,D], and its mirror
  m.def("decode(Tensor rows, Tensor dest, Tensor source, Tensor weights) -> Tensor");
  m.def(
      "decode_backward(Tensor grad_y, Tensor rows, Tensor dest, Tensor source, Tensor weights) "
      "-> (Tensor grad_rows, Tensor grad_weights)");

  // act(gate) * up, or act(gate) alone
  m.def("activation(Tensor gate, Tensor? up, str kind) -> Tensor");
  m.def("activation_backward(Tensor grad, Tensor gate, Tensor? up, str kind) -> (Tensor, Tensor)");

  // rows [R,D] through each expert's feed-forward network. Weights are lists: E matrices [out,in], or one
  // tensor [E,out,in]. `gate` is empty for a plain two-layer network; biases are empty where there are none.
  // A tile is the most rows and output columns of one GEMM. `keep` keeps the pre-activations for the backward.
  // `zero_unused`: an expert of a list that got no rows has a zero gradient; otherwise it has none, returned as an
  // empty tensor. Expert e owns rows offsets[e] .. offsets[e] + min(counts[e], offsets[e+1] - offsets[e]); others give
  // zeros.
  m.def(
      "expert_ffn(Tensor rows, Tensor counts, Tensor offsets, Tensor[] gate, Tensor[] up, Tensor[] down, "
      "Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation, int tile_rows, "
      "int tile_columns, bool keep, bool zero_unused) -> (Tensor out, Tensor gate_pre, Tensor up_pre)");
  m.def(
      "expert_ffn_backward(Tensor grad_out, Tensor rows, Tensor counts, Tensor offsets, Tensor[] gate, "
      "Tensor[] up, Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, "
      "Tensor gate_pre, Tensor up_pre, str activation, int tile_rows, int tile_columns, bool need_rows, bool "
      "need_weights, "
      "bool zero_unused) "
      "-> (Tensor grad_rows, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, "
      "Tensor[] down_bias)");

  // x [T,D], expert_ids and weights [T,K], the experts of expert_ffn -> y [T,D] and the ragged map of route: dropless,
  // and without a gradient.
  m.def(
      "inference(Tensor x, Tensor expert_ids, Tensor weights, int num_experts, Tensor[] gate, Tensor[] up, "
      "Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation, int tile_rows, "
      "int tile_columns) -> (Tensor y, Tensor dest, Tensor source, Tensor counts, Tensor offsets)");
  // The same after linear(x, router [E,D]) and gate, whose results come with it.
  m.def(
      "gated_inference(Tensor x, Tensor router, int k, str score, bool renormalize, Tensor[] gate, Tensor[] up, "
      "Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation, int tile_rows, "
      "int tile_columns) -> (Tensor y, Tensor dest, Tensor source, Tensor counts, Tensor offsets, Tensor logits, "
      "Tensor expert_ids, Tensor weights)");

  // rows [R,I] through each expert's own matrix: rows @ weight[e]^T + bias[e] -> [R,O]. Weights, rows and tiles as
  // above.
  m.def(
      "expert_linear(Tensor rows, Tensor counts, Tensor offsets, Tensor[] weight, Tensor[] bias, int tile_rows, "
      "int tile_columns) -> Tensor");
  m.def(
      "expert_linear_backward(Tensor grad_out, Tensor rows, Tensor counts, Tensor offsets, Tensor[] weight, "
      "Tensor[] bias, int tile_rows, int tile_columns, bool need_rows, bool need_weights) "
      "-> (Tensor grad_rows, Tensor[] weight, Tensor[] bias)");
  // Whether the library's own products of a dtype are slower on this CPU than those of float32 with the copies.
  m.def("widens(ScalarType dtype) -> bool");
  // Memory that freed results left behind on the CPU, for the next ones (csrc/cpu/buffers.cpp).
  m.def("set_buffer_limit(int bytes) -> ()");
  m.def("release_buffers() -> ()");
  m.def("idle_buffer_bytes() -> int");
}
