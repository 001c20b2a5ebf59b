// What the host, or the control group that this process is in, has free.
#pragma once

#include <cstdint>
#include <string>

namespace uly {

struct HostMemory {
  int64_t free_bytes = 0;        // unused, or what a control group's limit leaves; 0 where the system does not say
  int64_t obtainable_bytes = 0;  // and the group's file cache, which the kernel gives up before it refuses anything
  bool in_group = false;         // a control group leaves less than the host has
};

// `root` lies before /proc and /sys: "" but in tests.
HostMemory host_memory(const std::string& root = "");

// What this process has of it that is not mapped from files: it is not free, and its own.
int64_t own_bytes(const std::string& root = "");

}  // namespace uly
