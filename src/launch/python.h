// The Python side, run as a child: preparing data, fetching models.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"

namespace uly::launch {

struct Output {
  int exit_code = 0;  // 128 + the signal that ended it
  std::string text;   // its stdout
};

// Runs a program to its end; its stderr is this process's, its stdin too unless `in_fd` is to be it. Throws UserError if it cannot be started.
Output run_and_capture(const std::vector<std::string>& command, int in_fd = -1);

// Runs `python -m module arguments...` and returns the last line of its stdout. Where it fails it has spoken on stderr:
// throws an Error with its exit code and, if that is one of ours, no message.
std::string run_python(const std::string& module, const std::vector<std::string>& arguments);

// The same with `--request FILE`, a file that holds `request` and that the module alone can read: its stdin; the line is a JSON object.
Json run_python(const std::string& module, const Json& request);

}  // namespace uly::launch
