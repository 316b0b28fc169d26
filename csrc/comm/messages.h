// One small message from every rank to every other, with the name of whoever does not send its own.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "group.h"

namespace tutelx::comm {

struct Messages {
  at::Tensor table;                  // [W, capacity] int64 on the CPU, row r from rank r
  std::vector<std::string> missing;  // why there is none from rank r; empty where there is one
};

// message: [n] int64 on the CPU, n <= capacity, which is equal on all ranks. Over gloo from rank to rank, so that the
// rank that is missing is known once the group's timeout is over; elsewhere an all-gather on `device`.
Messages gather_messages(const Group& group, const at::Tensor& message, int64_t capacity, const c10::Device& device);

}  // namespace tutelx::comm
