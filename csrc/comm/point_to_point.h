// All-to-all out of single messages.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "group.h"

namespace tutelx::comm {

using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

// As alltoall_base, on CPU tensors cut along their first dimension. gloo's own posts what it sends before what it
// expects; the note that says "I am ready to receive" then waits on the same connection behind the rows, and the other
// side cannot begin until they are through: on a slow link the two directions take turns. Here receives come first.
// Calls on one group must be made in the same order on all ranks.
Works point_to_point_all_to_all(const Group& group, const at::Tensor& to, const at::Tensor& from,
                                const Splits& out_splits, const Splits& in_splits);

}  // namespace tutelx::comm
