#include "point_to_point.h"

namespace tutelx::comm {
namespace {

constexpr int kTag = 0x7478;  // messages with one tag arrive in the order in which they were sent

Splits begins(const Splits& splits) {
  Splits out{0};
  for (const int64_t n : splits) out.push_back(out.back() + n);
  return out;
}

}  // namespace

Works point_to_point_all_to_all(const Group& group, const at::Tensor& to, const at::Tensor& from,
                                const Splits& out_splits, const Splits& in_splits) {
  const int64_t W = group->getSize(), me = group->getRank();
  const Splits in = begins(in_splits), out = begins(out_splits);
  Works works;
  const auto part = [](const at::Tensor& t, const Splits& begin, int64_t rank) {
    return t.narrow(0, begin[rank], begin[rank + 1] - begin[rank]);
  };
  for (int64_t step = 1; step < W; ++step) {
    const int64_t peer = (me + W - step) % W;
    std::vector<at::Tensor> rows{part(to, out, peer)};
    if (rows[0].numel() > 0) works.push_back(group->recv(rows, static_cast<int>(peer), kTag));
  }
  for (int64_t step = 1; step < W; ++step) {
    const int64_t peer = (me + step) % W;
    std::vector<at::Tensor> rows{part(from, in, peer)};
    if (rows[0].numel() > 0) works.push_back(group->send(rows, static_cast<int>(peer), kTag));
  }
  part(to, out, me).copy_(part(from, in, me));
  return works;
}

}  // namespace tutelx::comm
