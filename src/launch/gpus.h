// The GPUs of this machine, as its driver knows them: asked through NVML, without CUDA, in milliseconds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace uly::launch {

struct Gpu {
  int64_t index = -1;                       // as nvidia-smi numbers it; -1 for a part of one (MIG)
  std::string uuid, name;
  int major = 0, minor = 0;                 // compute capability; 0: not known
  int64_t total_bytes = 0, free_bytes = 0;  // 0: not known
  struct Process {
    int64_t pid = 0;
    int64_t bytes = 0;  // 0: not known
  };
  std::vector<Process> processes;  // those that compute on it
  std::string trouble;             // why the driver does not reach it: then nothing else is known
};

struct Driver {
  std::string version;   // "580.65.06"
  int cuda_version = 0;  // the newest that it supports: 13000 is 13.0
};

enum class Nvml { kNotAsked, kMissing, kFailed, kAnswered };

struct Gpus {
  int64_t in_machine = 0;
  int64_t visible = 0;
  std::optional<std::string> variable;  // CUDA_VISIBLE_DEVICES, where it is set
  bool shared = false;                  // ULYSSES_SHARE_GPU=1: ranks may share a GPU

  Nvml nvml = Nvml::kNotAsked;
  std::string why;        // why NVML has not answered
  Driver driver;          // what follows is known only if it has
  std::vector<Gpu> list;  // the visible ones, in the order of CUDA_VISIBLE_DEVICES
};

// Counts the driver's device files, filtered by CUDA_VISIBLE_DEVICES; asks nobody.
Gpus visible_gpus();

// Asks NVML, libnvidia-ml.so.1, which comes with the driver. Where it is missing or fails: what visible_gpus() counts.
Gpus ask_gpus();

// How many of `in_machine` GPUs a CUDA_VISIBLE_DEVICES of this value shows. Like CUDA: numbers or UUIDs, and the list
// ends at the first entry that is neither or that does not exist; a GPU named twice hides all.
int64_t count_visible(const std::string& value, int64_t in_machine);

// The same, of GPUs that are known: a UUID may be cut short as long as it means one GPU. What is said of parts of GPUs
// (MIG) is believed; they come with their UUID only.
std::vector<Gpu> pick_visible(const std::string& value, const std::vector<Gpu>& in_machine);

// CUDA_DEVICE_ORDER for the ranks: the user's, else PCI_BUS_ID, so that CUDA numbers the GPUs as NVML does.
std::string cuda_device_order();

// The file with all that computes on GPUs, beside the program; where it was not built there is none.
std::string gpu_part_path();

}  // namespace uly::launch
