// What the backward nodes of the operators share. They are written by hand: a node registered from Python costs more
// than a small operator itself.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <vector>

namespace tutelx::autograd {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// A shared_ptr in some versions of torch, an intrusive_ptr in later ones.
using NodePointer = std::decay_t<decltype(torch::autograd::Edge::function)>;

template <class N, class Pointer>
struct Maker {
  static Pointer make() { return c10::make_intrusive<N>(); }
};
template <class N>
struct Maker<N, std::shared_ptr<Node>> {
  // deleteNode unwinds long graphs without recursion; found through the node's base class.
  static std::shared_ptr<Node> make() {
    return std::shared_ptr<Node>(new N(), [](N* node) { deleteNode(node); });
  }
};

// A node whose gradients go to `inputs`, in their order; lists count one each.
template <class N, class... Inputs>
std::pair<NodePointer, N*> make_node(const Inputs&... inputs) {
  NodePointer pointer = Maker<N, NodePointer>::make();
  N* const node = static_cast<N*>(&*pointer);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return {std::move(pointer), node};
}

// Whether a gradient can be asked for. Forward-mode derivatives would be dropped in silence.
inline bool differentiated(const Tensor& t) {
  if (!t.defined()) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(0).defined(), "tutelx has no forward-mode derivatives");
  return t.requires_grad();
}
inline bool differentiated(const std::optional<Tensor>& t) { return t && differentiated(*t); }
inline bool differentiated(at::TensorList list) {
  bool any = false;
  for (const Tensor& t : list) any |= differentiated(t);
  return any;
}
template <class... Inputs>
bool records(const Inputs&... inputs) {
  return (static_cast<int>(differentiated(inputs)) | ...) && torch::autograd::GradMode::is_enabled();
}

// The operator `name`, to be called again below autograd.
template <class Signature>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The operator itself: nothing is recorded.
template <class Op, class... Arguments>
auto below(const Op& op, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(arguments...);
}

inline SavedVariable saved(const Tensor& t) { return {t, /*is_output=*/false}; }
inline std::vector<SavedVariable> saved(at::TensorList list) {
  std::vector<SavedVariable> out;
  out.reserve(list.size());
  for (const Tensor& t : list) out.push_back(saved(t));
  return out;
}
inline std::vector<Tensor> unpacked(const std::vector<SavedVariable>& list) {
  std::vector<Tensor> out;
  out.reserve(list.size());
  for (const SavedVariable& s : list) out.push_back(s.unpack());
  return out;
}

}  // namespace tutelx::autograd
