// All-to-all -> experts -> all-to-all, cut into chunks so that one chunk travels while another is computed.
#pragma once
#include <ATen/ATen.h>

#include <functional>

#include "exchange.h"
#include "traffic.h"

namespace tutelx::comm {

// chunk, rows [n, M] by expert -> [n, M].
using ChunkFn = std::function<at::Tensor(int64_t, const at::Tensor&)>;

// rows [R*r, M] in the send order -> what came back for them, in the same order. Serves the backward too: gradients
// take the same ways. Every rank issues the same transfers in the same order. Without an exchange all rows stay here.
at::Tensor run_pipeline(Exchange* exchange, const Traffic& traffic, const at::Tensor& rows, const ChunkFn& compute);

}  // namespace tutelx::comm
