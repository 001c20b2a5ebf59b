#include "plan/rates.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace uly::plan {
namespace {

constexpr double kTera = 1e12, kGiga = 1e9;

// Hopper: measured here (bench/results), in whole steps at the power limit. The others: from what their makers state, times what
// Hopper reaches of it. Exchanges have not been measured: of what makers state of NVLink and of the network of their own nodes, the
// part that NCCL is known to reach.
struct Preset {
  const char* name;  // part of what the driver calls the GPU
  double gemm, attention_forward, attention_backward;  // TFLOP/s, of long documents
  double memory, link;                                 // GB/s; the link one way, while the other way is busy too
  double nvlink, network;                              // GB/s of a GPU, sent while as much comes: to others in its node, to other nodes
};
constexpr std::array kPresets = {
    Preset{"B200", 1580, 1300, 1090, 6500, 50, 700, 45}, Preset{"H200", 705, 605, 548, 4000, 46, 350, 45}, Preset{"H100", 690, 594, 537, 2700, 46, 350, 45},
    Preset{"GH200", 690, 594, 537, 3300, 300, 350, 45},  Preset{"A100", 265, 210, 190, 1500, 22, 200, 22},
};
constexpr double kGloo = 2 * kGiga;  // bytes/s through host memory
constexpr double kDisk = 1.4 * kGiga, kHostUpdatePerCore = 5.2 * kGiga;  // bytes/s; the latter of 16, memory being shared with copies

// Of a rank that sends the same to each of `ranks`, `near` of which are in its node.
double all_to_all_rate(double ranks, double near, double nvlink, double network) {
  if (ranks <= 1) return nvlink;
  const double away = (ranks - near) / (ranks - 1);
  return away == 0 ? nvlink : 1 / std::max(away / network, (1 - away) / nvlink);  // both ways at once
}

void set_links(Rates& r, const Preset& gpu, bool has_nvlink, const Links& links) {
  if (!links.nccl) {
    r.sequence_bytes = r.node_bytes = r.gather_bytes = r.scatter_bytes = kGloo;
    return;
  }
  const double share = static_cast<double>(std::max<int64_t>(1, links.gpu_ranks)), node = static_cast<double>(std::clamp<int64_t>(links.node_ranks, 1, links.W));
  const double nvlink = (has_nvlink ? gpu.nvlink : gpu.link / 2) * kGiga / share, network = gpu.network * kGiga / share;
  const double W = static_cast<double>(links.W), P = static_cast<double>(links.P);
  r.sequence_bytes = all_to_all_rate(P, std::min(P, node), nvlink, network);
  r.scatter_bytes = all_to_all_rate(W, node, nvlink, network);
  // What others have comes into a node once, through all its adapters, and is passed on there.
  const auto gathered = [&](double ranks) { return ranks > node ? std::min(nvlink, network * node) : nvlink; };
  r.gather_bytes = gathered(W), r.node_bytes = gathered(static_cast<double>(links.near));
}

}  // namespace

Rates preset_rates(const std::string& gpu, int64_t host_cores, const Links& links) {
  const Preset* found = nullptr;
  for (const Preset& p : kPresets)
    if (gpu.find(p.name) != std::string::npos && (!found || std::strlen(p.name) > std::strlen(found->name))) found = &p;
  Rates r;
  r.known = found != nullptr;
  if (!found) found = &kPresets[2];
  r.gemm_flops = found->gemm * kTera;
  r.attention_forward_flops = found->attention_forward * kTera, r.attention_backward_flops = found->attention_backward * kTera;
  r.attention_half_tokens = kGpuAttentionHalfTokens;
  r.device_bytes = found->memory * kGiga;
  r.to_host_bytes = r.to_device_bytes = found->link * kGiga;
  r.disk_bytes = kDisk;
  r.host_update_bytes = kHostUpdatePerCore * static_cast<double>(host_cores);
  set_links(r, *found, gpu.find("PCI") == std::string::npos, links);
  return r;
}

}  // namespace uly::plan
