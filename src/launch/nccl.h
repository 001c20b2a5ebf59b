// NVIDIA's library for exchanges between GPUs, as far as it can be known without a GPU: where it is, of which version, and
// what the user wants.
#pragma once

#include <cstdint>
#include <string>

namespace uly::launch {

struct Nccl {
  int version = 0;   // 22809 is 2.28.9; 0: it cannot be loaded
  std::string why;   // it cannot be
};

// Loads libnccl.so.2: from LD_LIBRARY_PATH, else the one that comes with torch. What is loaded first in a process is used by all
// of it, torch too, so that a newer one on LD_LIBRARY_PATH takes the place of torch's.
Nccl find_nccl();

// "2.28.9"
std::string nccl_words(int version);

// From which version on ranks may share a GPU.
inline constexpr int kNcclSharesGpus = 23000;

// ULYSSES_COMM: gloo or nccl; "" where it is not set. Throws UserError for anything else.
std::string wanted_comm();

// Sets what NCCL reads from the environment, before it is first used, unless the user has: that ranks may share a GPU; that ranks of
// one machine meet at its loopback interface.
void prepare_nccl(bool shared_gpus, bool one_machine);

// What a machine lacks that NCCL wants, in a sentence; "" if nothing is.
//
// Devices of a fabric that NCCL reaches by a plugin only (Amazon's EFA), and no plugin that can be loaded. `devices`: /sys/class/infiniband.
std::string missing_plugin(const std::string& devices);
// Room in /dev/shm, by which GPUs of one machine may exchange.
std::string little_shared_memory(const std::string& folder);

}  // namespace uly::launch
