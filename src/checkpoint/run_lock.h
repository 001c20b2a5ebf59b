// That one run alone writes somewhere: a lock of the file system, which goes with the process, however that ends.
#pragma once

#include <string>

namespace uly::checkpoint {

// Takes the lock of an open file; waits some seconds for a run that is about to end. False where another has it. A file system without locks
// gives it to everybody.
bool take_lock(int fd);

// The lock of a folder for states, at FOLDER/run.lock, which stays and tells who has had it last. The folder is made. Where no file can be made
// there nothing is locked: whoever saves there will say so.
class RunLock {
 public:
  // `holder`: "pid 4711 on node2". Throws UserError that names who has it.
  RunLock(const std::string& folder, const std::string& holder);
  ~RunLock();
  RunLock(RunLock&& other) noexcept : fd_(other.fd_), path_(other.path_), content_(other.content_) { other.fd_ = -1; }
  RunLock& operator=(RunLock&&) = delete;

  const std::string& path() const { return path_; }
  // Of its file, unlike all others' before; "" where there is none.
  const std::string& content() const { return content_; }

 private:
  int fd_ = -1;
  std::string path_, content_;
};

}  // namespace uly::checkpoint
