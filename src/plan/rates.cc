#include "plan/rates.h"

#include <array>
#include <cstring>

namespace uly::plan {
namespace {

constexpr double kTera = 1e12, kGiga = 1e9;

// Hopper: measured here (bench/results), in whole steps at the power limit. The others: from what their makers state, times what
// Hopper reaches of it.
struct Preset {
  const char* name;  // part of what the driver calls the GPU
  double gemm, attention_forward, attention_backward;  // TFLOP/s
  double memory, link;                                 // GB/s; the link one way, while the other way is busy too
};
constexpr std::array kPresets = {
    Preset{"B200", 1580, 1200, 1000, 6500, 50}, Preset{"H200", 705, 560, 505, 4000, 46}, Preset{"H100", 690, 550, 495, 2700, 46},
    Preset{"GH200", 690, 550, 495, 3300, 300},  Preset{"A100", 265, 195, 175, 1500, 22},
};
constexpr double kDisk = 1.4 * kGiga, kHostUpdatePerCore = 5.2 * kGiga;  // bytes/s; the latter of 16, memory being shared with copies

}  // namespace

Rates preset_rates(const std::string& gpu, int64_t host_cores) {
  const Preset* found = nullptr;
  for (const Preset& p : kPresets)
    if (gpu.find(p.name) != std::string::npos && (!found || std::strlen(p.name) > std::strlen(found->name))) found = &p;
  Rates r;
  r.known = found != nullptr;
  if (!found) found = &kPresets[2];
  r.gemm_flops = found->gemm * kTera;
  r.attention_forward_flops = found->attention_forward * kTera, r.attention_backward_flops = found->attention_backward * kTera;
  r.device_bytes = found->memory * kGiga;
  r.to_host_bytes = r.to_device_bytes = found->link * kGiga;
  r.disk_bytes = kDisk;
  r.host_update_bytes = kHostUpdatePerCore * static_cast<double>(host_cores);
  r.sequence_bytes = r.world_bytes = 100 * kGiga;
  return r;
}

}  // namespace uly::plan
