// How fast a machine is: what turns a program's arithmetic and traffic into seconds.
#pragma once

#include <cstdint>
#include <string>

namespace uly::plan {

// Each per second; 0: takes no time. Measured while all else runs too: at the power limit, both ways of a link at once.
struct Rates {
  bool known = true;                     // false: those of a GPU that is taken for this one
  double gemm_flops = 0;                 // of large products
  double attention_forward_flops = 0, attention_backward_flops = 0;  // the causal half
  double device_bytes = 0;               // read and written by element-wise kernels
  double to_host_bytes = 0, to_device_bytes = 0;
  double disk_bytes = 0;                 // read or written
  double host_update_bytes = 0;          // read and written by AdamW on the host
  double sequence_bytes = 0, world_bytes = 0;  // sent by a rank to others of its sequence, of the world
};

// What is known of a GPU by its name, beside a host of so many cores; H100's where the name says nothing.
Rates preset_rates(const std::string& gpu, int64_t host_cores);

}  // namespace uly::plan
