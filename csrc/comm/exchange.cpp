#include "exchange.h"

#include <numeric>

#include "../check.h"

namespace tutelx::comm {
namespace {

int64_t sum(const Splits& splits) { return std::accumulate(splits.begin(), splits.end(), int64_t{0}); }

class Linear : public Transfer {
 public:
  Linear(const Group& group, const at::Tensor& rows, const RowCounts& counts, const at::Tensor& out,
         const SideStream& stream, bool after_compute, int64_t& bytes_sent)
      : stream_(stream) {
    const int64_t me = group->getRank();
    Splits sent, received;
    for (int64_t r = 0; r < counts.world(); ++r) {
      sent.push_back(counts.at(me, r));
      received.push_back(counts.at(r, me));
    }
    stream_.used_beside(rows);
    stream_.used_beside(out);
    stream_.run(after_compute, [&] { flight_.emplace(group, rows, sent, received, out, bytes_sent); });
  }

  void advance() override {}

  at::Tensor finish() override {
    at::Tensor out;
    stream_.run(false, [&] { out = flight_->wait(); });
    stream_.join();
    stream_.used_in_compute(out);
    return out;
  }

 private:
  const SideStream& stream_;
  std::optional<Flight> flight_;
};

// Cuts `rows` into blocks and puts them together in another order. `order` lists (first row, rows).
at::Tensor rearranged(const at::Tensor& rows, const std::vector<std::pair<int64_t, int64_t>>& order) {
  std::vector<at::Tensor> blocks;
  int64_t next = 0;
  bool moved = false;
  for (const auto& [first, n] : order) {
    if (n == 0) continue;
    moved |= first != next;
    next = first + n;
    blocks.push_back(rows.narrow(0, first, n));
  }
  return moved ? at::cat(blocks) : rows;
}

// Rank (a, i), local rank i of node a, sends to its neighbour (a, j) what any (b, j) is to get; (a, j) sends on to
// (b, j) what all (a, i) have for it. What arrives is ordered by (a, i), as in the linear exchange.
class Hierarchical : public Transfer {
 public:
  Hierarchical(const Group& intra, Group inter, const at::Tensor& rows, const RowCounts& counts, at::Tensor out,
               int64_t me, const SideStream& stream, bool after_compute, int64_t& bytes_sent)
      : inter_(std::move(inter)),
        out_(std::move(out)),
        counts_(counts),
        stream_(stream),
        bytes_sent_(bytes_sent),
        m_(intra->getSize()),
        nodes_(inter_->getSize()),
        node_(me / m_),
        local_(me % m_) {
    std::vector<int64_t> first(counts.world() + 1, 0);
    for (int64_t r = 0; r < counts.world(); ++r) first[r + 1] = first[r] + counts.at(me, r);
    std::vector<std::pair<int64_t, int64_t>> order;  // by (j, b) instead of (b, j)
    Splits sent(m_, 0), received(m_, 0);
    for (int64_t j = 0; j < m_; ++j)
      for (int64_t b = 0; b < nodes_; ++b) {
        order.emplace_back(first[b * m_ + j], counts.at(me, b * m_ + j));
        sent[j] += counts.at(me, b * m_ + j);
        received[j] += counts.at(node_ * m_ + j, b * m_ + local_);
      }
    stream_.used_beside(rows);
    stream_.used_beside(out_);
    stream_.run(after_compute,
                [&] { flight_.emplace(intra, rearranged(rows, order), sent, received, at::Tensor(), bytes_sent); });
    if (!rows.is_cpu()) advance();  // streams keep the order, so that both steps can be issued at once
  }

  void advance() override {
    if (on_its_way_) return;
    on_its_way_ = true;
    stream_.run(false, [&] {
      const at::Tensor passing = flight_->wait();  // by (i, b)
      std::vector<int64_t> first(m_ * nodes_ + 1, 0);
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t b = 0; b < nodes_; ++b) first[i * nodes_ + b + 1] = first[i * nodes_ + b] + passing_rows(i, b);
      std::vector<std::pair<int64_t, int64_t>> order;  // by (b, i)
      Splits sent(nodes_, 0), received(nodes_, 0);
      for (int64_t b = 0; b < nodes_; ++b)
        for (int64_t i = 0; i < m_; ++i) {
          order.emplace_back(first[i * nodes_ + b], passing_rows(i, b));
          sent[b] += passing_rows(i, b);
          received[b] += counts_.at(b * m_ + i, node_ * m_ + local_);
        }
      flight_.emplace(inter_, rearranged(passing, order), sent, received, out_, bytes_sent_);
    });
  }

  at::Tensor finish() override {
    advance();
    at::Tensor out;
    stream_.run(false, [&] { out = flight_->wait(); });
    stream_.join();
    stream_.used_in_compute(out);
    return out;
  }

 private:
  // Rows that the neighbour i sends through this rank to node b.
  int64_t passing_rows(int64_t i, int64_t b) const { return counts_.at(node_ * m_ + i, b * m_ + local_); }

  Group inter_;
  at::Tensor out_;
  RowCounts counts_;
  const SideStream& stream_;
  int64_t& bytes_sent_;
  int64_t m_, nodes_, node_, local_;
  bool on_its_way_ = false;
  std::optional<Flight> flight_;
};

}  // namespace

RowCounts RowCounts::reversed() const {
  RowCounts out(world_);
  for (int64_t from = 0; from < world_; ++from)
    for (int64_t to = 0; to < world_; ++to) out.at(to, from) = at(from, to);
  return out;
}

Flight::Flight(const Group& group, const at::Tensor& in, Splits in_splits, Splits out_splits, const at::Tensor& out,
               int64_t& bytes_sent)
    : in_(in), out_(out) {
  std::vector<int64_t> shape = in.sizes().vec();
  const int64_t row_bytes = in.element_size() * (in.size(0) == 0 ? 0 : in.numel() / in.size(0));
  bytes_sent += (in.size(0) - in_splits[group->getRank()]) * row_bytes;
  shape[0] = sum(out_splits);
  if (!out_.defined()) out_ = at::empty(shape, in.options());
  TORCH_INTERNAL_ASSERT(out_.size(0) == shape[0] && out_.is_contiguous() && in_.is_contiguous());
  auto [from, to] = on_the_way(group);
  talk("the all-to-all", [&, &from = from, &to = to] {
    if (backend_name(group, to.device().type()) == "gloo") {
      works_ = point_to_point_all_to_all(group, to, from, out_splits, in_splits);
      return 0;
    }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // its newer name is missing in torch 2.10
    works_ = {group->alltoall_base(to, from, out_splits, in_splits)};
#pragma GCC diagnostic pop
    return 0;
  });
}

Flight::Flight(const Group& group, const at::Tensor& in, int64_t& bytes_sent) : in_(in.contiguous()) {
  std::vector<int64_t> shape = in.sizes().vec();
  shape[0] *= group->getSize();
  bytes_sent += (group->getSize() - 1) * in.nbytes();
  out_ = at::empty(shape, in.options());
  auto [from, to] = on_the_way(group);
  // As bytes: not every backend gathers every dtype.
  from = from.view({-1}).view(at::kByte), to = to.view({-1}).view(at::kByte);
  talk("the all-gather", [&, &from = from, &to = to] {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // its newer name is missing in torch 2.10
    works_ = {group->_allgather_base(to, from)};
#pragma GCC diagnostic pop
    return 0;
  });
}

std::pair<at::Tensor, at::Tensor> Flight::on_the_way(const Group& group) {
  if (!is_staged(group, in_.device())) return {in_, out_};
  const auto host = in_.options().device(at::kCPU).pinned_memory(true);
  at::Tensor from = at::empty(in_.sizes(), host);
  from.copy_(in_);
  in_ = from;
  host_out_ = at::empty(out_.sizes(), host);
  return {from, host_out_};
}

at::Tensor Flight::wait() {
  for (const auto& work : works_) talk("the exchange", [&] { return work->wait(); });
  works_.clear();
  if (host_out_.defined()) out_.copy_(host_out_, /*non_blocking=*/true);
  in_.reset();
  return out_;
}

Exchange::Exchange(Group all) : all_(std::move(all)) {}

Exchange::Exchange(Group all, Group intra, Group inter)
    : all_(std::move(all)), intra_(std::move(intra)), inter_(std::move(inter)) {
  const int64_t m = intra_->getSize(), nodes = inter_->getSize();
  TORCH_CHECK_VALUE(m * nodes == world(), "2dh needs ", m, " ranks a node x ", nodes, " nodes, the group has ",
                    world());
  TORCH_CHECK_VALUE(intra_->getRank() == rank() % m && inter_->getRank() == rank() / m, "rank ", rank(),
                    " is local rank ", intra_->getRank(), " of node ", inter_->getRank(), ", expected ", rank() % m,
                    " of ", rank() / m);
}

std::unique_ptr<Transfer> Exchange::start(const at::Tensor& rows, const RowCounts& counts, const at::Tensor& out,
                                          bool after_compute) {
  TORCH_CHECK_VALUE(counts.world() == world(), "counts are for ", counts.world(), " ranks, the group has ", world());
  int64_t sent = 0;
  for (int64_t r = 0; r < world(); ++r) sent += counts.at(rank(), r);
  check_size(rows, "rows", 0, sent, "the rows to send");
  const at::Tensor in = rows.contiguous();
  if (!stream_) stream_.emplace(in.device());
  if (hierarchical())
    return std::make_unique<Hierarchical>(intra_, inter_, in, counts, out, rank(), *stream_, after_compute,
                                          bytes_sent_);
  return std::make_unique<Linear>(all_, in, counts, out, *stream_, after_compute, bytes_sent_);
}

}  // namespace tutelx::comm
