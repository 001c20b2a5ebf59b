// The Python side, run as a child: preparing data, fetching models.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"

namespace uly::launch {

struct Output {
  int exit_code = 0;   // 128 + the signal that ended it
  std::string text;    // its stdout
};

// Runs a program to its end; its stderr is this process's. Throws UserError if it cannot be started.
Output run_and_capture(const std::vector<std::string>& command);

// Runs `python -m module --request FILE`, with `request` as the file's content, and returns the JSON it prints last on its
// stdout. Where it fails it has spoken on stderr: throws an Error with its exit code and, if that is one of ours, no
// message.
Json run_python(const std::string& module, const Json& request);

}  // namespace uly::launch
