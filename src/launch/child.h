// One child process: started with a given environment, never left behind.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace uly::launch {

struct ChildOptions {
  std::vector<std::string> command;      // path and arguments
  std::vector<std::string> environment;  // NAME=value
  int in_fd = -1, out_fd = -1, error_fd = -1;  // become its stdin, stdout and stderr; -1: this process's own
  bool hold_signals = false;             // SIGTERM, SIGINT and SIGUSR1 are blocked in it, until it says what they mean
  bool own_group = false;                // a process group of its own: a terminal's Ctrl-C does not reach it
};

// Opens those of stdin, stdout and stderr that are closed to nothing: else the next file or pipe would become one of them.
void keep_standard_streams();

// Starts it and returns its pid. It is killed when this process dies. Throws UserError if it cannot be started.
pid_t start_child(const ChildOptions& options);

// "SIGKILL" for 9.
std::string signal_name(int signal);

}  // namespace uly::launch
