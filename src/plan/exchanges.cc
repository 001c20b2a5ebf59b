#include "plan/exchanges.h"

#include <algorithm>

#include "base/check.h"
#include "launch/nccl.h"

namespace uly::plan {
namespace {

// Why NCCL cannot be; "" where it can.
std::string obstacle(const Machine& m) {
  if (!m.cuda) return "ranks are on the CPU";
  if (m.imagined) return "";
  if (m.nccl_version == 0) return m.nccl_why;
  if (m.gpu_ranks > 1 && m.nccl_version < launch::kNcclSharesGpus) return fmt::format("{} ranks share a GPU, which NCCL {} refuses and {} allows", m.gpu_ranks, launch::nccl_words(m.nccl_version), launch::nccl_words(launch::kNcclSharesGpus));
  return "";
}

}  // namespace

Exchanges choose_exchanges(const Machine& m, int64_t world) {
  const std::string wanted = m.imagined ? "" : launch::wanted_comm(), why_not = obstacle(m);
  ULY_USER_CHECK(wanted != "nccl" || !m.cuda || why_not.empty(), "ULYSSES_COMM=nccl: {}; use ULYSSES_COMM=gloo, or unset it", why_not);
  if (m.cuda && wanted == "gloo") return {.nccl = false, .words = "Gloo, through host memory: ULYSSES_COMM asks for it"};
  if (!why_not.empty()) return {.nccl = false, .words = fmt::format("Gloo{}: {}", m.cuda ? ", through host memory, which is slow" : "", why_not)};
  if (world == 1 && wanted != "nccl") return {.nccl = false, .words = "none: there is one rank"};
  return {.nccl = true, .words = m.imagined ? "NCCL, from GPU to GPU" : fmt::format("NCCL {}, from GPU to GPU", launch::nccl_words(m.nccl_version))};
}

int64_t nccl_bytes(const step::Mesh& mesh) {
  // Not measured: buffers of 4 MiB for each of up to 32 channels, and for each peer to which a rank sends by itself.
  constexpr int64_t kMiB = int64_t{1} << 20, kGroup = 192 * kMiB, kPeer = 32 * kMiB, kMostPeers = 8;
  const auto group = [=](int64_t ranks) { return ranks > 1 ? kGroup + kPeer * std::min(ranks - 1, kMostPeers) : 0; };
  return group(mesh.W) + group(mesh.P);
}

}  // namespace uly::plan
