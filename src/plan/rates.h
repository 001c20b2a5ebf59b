// How fast a machine is: what turns a program's arithmetic and traffic into seconds.
#pragma once

#include <cstdint>
#include <string>

namespace uly::plan {

// Each per second; 0: takes no time. Measured while all else runs too: at the power limit, both ways of a link at once.
struct Rates {
  bool known = true;                     // false: those of a GPU that is taken for this one
  bool shares_cores = false;             // copies, updates and exchanges take the cores that compute: on the CPU
  double gemm_flops = 0;                 // of large products
  double attention_forward_flops = 0, attention_backward_flops = 0;  // the causal half, of long documents
  double attention_half_tokens = 0;      // a document of so many tokens gets half of both
  double device_bytes = 0;               // read and written by element-wise kernels
  double to_host_bytes = 0, to_device_bytes = 0;
  double disk_bytes = 0;                 // read or written
  double host_update_bytes = 0;          // read and written by AdamW on the host
  double sequence_bytes = 0;             // sent by a rank to others of its sequence
  double node_bytes = 0;                 // received by a rank of weights that ranks near it have
  double gather_bytes = 0, scatter_bytes = 0;  // received by a rank of others' weights, sent to others of its gradients
};

// attention_half_tokens of a GPU: Hopper's, from rows of 16K to 1M tokens (bench/results).
inline constexpr double kGpuAttentionHalfTokens = 4096;

// How ranks are spread and what they exchange by.
struct Links {
  int64_t W = 1, P = 1, near = 1;         // near: ranks that share a second copy of the weights
  int64_t node_ranks = 1, gpu_ranks = 1;  // ranks on one machine, on one GPU
  bool nccl = true;                       // else through host memory
};

// What is known of a GPU by its name, beside a host of so many cores; H100's where the name says nothing.
Rates preset_rates(const std::string& gpu, int64_t host_cores, const Links& links = {});

}  // namespace uly::plan
