// Exchanges between ranks, and what packs and sums on either side of them.
#include <ATen/Parallel.h>

#include "base/check.h"
#include "engine/engine.h"
#include "kernels/exchange.h"

namespace uly::engine {
namespace {

// The column ranges of every rank's block in a packed buffer of `rows` rows a block.
std::vector<kernels::PackedColumns> packed(const ops::ColumnBlocks& blocks, int64_t rows) {
  std::vector<kernels::PackedColumns> ranges;
  int64_t block_at = 0;
  for (const auto& block : blocks) {
    int64_t width = 0;
    for (const ops::Columns& c : block) width += c.count;
    int64_t at = block_at;
    for (const ops::Columns& c : block) {
      if (c.count > 0) ranges.push_back({.first = c.first, .count = c.count, .at = at, .stride = width});
      at += c.count;
    }
    block_at += rows * width;
  }
  return ranges;
}

std::vector<int64_t> in_bytes(std::vector<int64_t> elements, Dtype dtype) {
  for (int64_t& n : elements) n *= bytes_of(dtype);
  return elements;
}

}  // namespace

void Engine::pack_columns(ops::Buffer send, ops::Buffer x, const ops::ColumnBlocks& blocks) {
  const auto ranges = packed(blocks, x.rows);
  const kernels::PackArgs args{.x = matrix(x), .packed = address(send), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())};
  at::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.columns), [&](int64_t begin, int64_t end) { kernels::cpu::pack_columns(args, begin, end); });
}

void Engine::unpack_columns(ops::Buffer x, ops::Buffer received, const ops::ColumnBlocks& blocks) {
  const auto ranges = packed(blocks, x.rows);
  const kernels::PackArgs args{.x = matrix(x), .packed = address(received), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())};
  at::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.columns), [&](int64_t begin, int64_t end) { kernels::cpu::unpack_columns(args, begin, end); });
}

ops::Event Engine::started(comm::Work work) {
  works_.push_back(std::move(work));
  return {static_cast<int32_t>(works_.size()) - 1};
}

ops::Event Engine::all_to_all(ops::Buffer received, ops::Buffer send, ops::Group which, const std::vector<int64_t>& receive_elements, const std::vector<int64_t>& send_elements) {
  return started(group(which).all_to_all(address(received), address(send), in_bytes(receive_elements, received.dtype), in_bytes(send_elements, send.dtype)));
}

ops::Event Engine::all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group which) { return started(group(which).all_gather(address(whole), address(shard), shard.bytes())); }

ops::Event Engine::scatter(ops::Buffer received, ops::Buffer whole, ops::Group which) {
  const int64_t ranks = group(which).size();
  const std::vector<int64_t> each(static_cast<size_t>(ranks), whole.bytes() / ranks);
  return started(group(which).all_to_all(address(received), address(whole), each, each));
}

void Engine::sum_pieces(ops::Buffer shard, ops::Buffer received, int64_t pieces) {
  const kernels::SumPiecesArgs args{.shard = matrix(shard), .received = matrix(received), .pieces = pieces};
  at::parallel_for(0, shard.elements(), 32768, [&](int64_t begin, int64_t end) { kernels::cpu::sum_pieces(args, begin, end); });
}

ops::Event Engine::all_reduce(ops::Buffer x, ops::Group which) {
  ULY_CHECK(x.dtype == Dtype::kF64, "sums over ranks are fp64");
  return started(group(which).all_reduce_sum(static_cast<double*>(address(x)), x.elements()));
}

void Engine::wait(ops::Event event) {
  if (event.id >= 0) works_[static_cast<size_t>(event.id)].wait();
}

}  // namespace uly::engine
