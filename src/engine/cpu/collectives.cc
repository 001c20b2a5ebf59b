// Exchanges between ranks, and what packs and sums on either side of them.
#include <ATen/Parallel.h>

#include "base/check.h"
#include "engine/cpu/cpu_engine.h"
#include "kernels/exchange.h"

namespace uly::engine {

void CpuEngine::pack_columns(ops::Buffer send, ops::Buffer x, const ops::ColumnBlocks& blocks) {
  const auto ranges = packed_columns(blocks, x.rows);
  const kernels::PackArgs args{.x = matrix(x), .packed = address(send), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())};
  at::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.columns), [&](int64_t begin, int64_t end) { kernels::cpu::pack_columns(args, begin, end); });
}

void CpuEngine::unpack_columns(ops::Buffer x, ops::Buffer received, const ops::ColumnBlocks& blocks) {
  const auto ranges = packed_columns(blocks, x.rows);
  const kernels::PackArgs args{.x = matrix(x), .packed = address(received), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())};
  at::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.columns), [&](int64_t begin, int64_t end) { kernels::cpu::unpack_columns(args, begin, end); });
}

ops::Event CpuEngine::all_to_all(ops::Buffer received, ops::Buffer send, ops::Group which, const std::vector<int64_t>& receive_elements, const std::vector<int64_t>& send_elements) {
  return exchange(group(which).all_to_all(address(received), address(send), in_bytes(receive_elements, received.dtype), in_bytes(send_elements, send.dtype)));
}

ops::Event CpuEngine::all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group which) { return exchange(group(which).all_gather(address(whole), address(shard), shard.bytes())); }

ops::Event CpuEngine::scatter(ops::Buffer received, ops::Buffer whole, ops::Group which) {
  const int64_t ranks = group(which).size();
  const std::vector<int64_t> each(static_cast<size_t>(ranks), whole.bytes() / ranks);
  return exchange(group(which).all_to_all(address(received), address(whole), each, each));
}

void CpuEngine::sum_pieces(ops::Buffer shard, ops::Buffer received, int64_t pieces) {
  const kernels::SumPiecesArgs args{.shard = matrix(shard), .received = matrix(received), .pieces = pieces};
  at::parallel_for(0, shard.elements(), 32768, [&](int64_t begin, int64_t end) { kernels::cpu::sum_pieces(args, begin, end); });
}

ops::Event CpuEngine::all_reduce(ops::Buffer x, ops::Group which) {
  ULY_CHECK(x.dtype == Dtype::kF64, "sums over ranks are fp64");
  return exchange(group(which).all_reduce_sum(static_cast<double*>(address(x)), x.elements()));
}

}  // namespace uly::engine
