// Scratch files on one or more disks, read and written past the page cache and in the background: the tier beyond host
// memory. Bytes are striped over the folders in chunks, so that several disks work at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

namespace uly::memory {

class DiskQueue;

// For tests: what is to go wrong.
struct Faults {
  int64_t fail_after_bytes = -1;  // once more than so many have moved, reads and writes together, one piece ends with `error`
  int error = 0;
  int64_t longest = 0;            // a read or write moves at most so many bytes; 0: all
  bool no_tmpfile = false, no_direct = false, no_fallocate = false, no_io_uring = false;
};

// From words with commas between them: after=BYTES, error=NUMBER (of errno), no_tmpfile, no_direct, no_fallocate, no_io_uring.
Faults faults_from(const std::string& words);

// Not thread-safe: one thread uses it, and lives as long as what it started (io_uring ends what an ended thread began).
class Disk {
 public:
  static constexpr int64_t kChunkBytes = int64_t{16} << 20;  // chunk i lies in folder i % n
  static constexpr int64_t kBlockBytes = 4096;               // of which offsets, addresses and bytes are multiples

  // Makes a file without a name in each folder and takes its share of `bytes` at once; what is there ends with the process,
  // however it ends. `depth`: how many pieces (of a chunk or less) are in flight at most. Throws UserError where a folder
  // cannot be used or has too little room.
  Disk(const std::vector<std::string>& folders, int64_t bytes, int depth, const Faults& faults = {});
  ~Disk();  // waits for what is in flight
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  // The memory must stay until complete() has returned the tag. Requests in flight have no order among them: to read what
  // was written, await the write. With `depth` pieces in flight these wait for one to end.
  void start_write(int64_t offset, const std::byte* from, int64_t bytes, uint64_t tag);
  void start_read(int64_t offset, std::byte* to, int64_t bytes, uint64_t tag);

  // The tag of the next request to finish. Throws for one that failed: UserError where a disk is full, else DeviceError.
  uint64_t complete();
  bool busy() const { return !finished_.empty() || free_.size() < pieces_.size(); }  // complete() has something to return

  int64_t bytes() const { return bytes_; }
  int64_t held_bytes() const;  // of the disks, as their file systems count them
  const std::string& words() const { return words_; }  // "40.0 GiB in /scratch, O_DIRECT, io_uring"

 private:
  struct File {
    std::string folder;
    int fd = -1;
    bool direct = false;
    ~File();
  };
  struct Request {
    uint64_t tag = 0;
    bool write = false;
    int64_t left = 0;            // pieces
    int error = 0;               // the first piece's that failed
    const File* file = nullptr;  // and where
  };
  struct Piece {
    std::shared_ptr<Request> request;
    const File* file = nullptr;
    int64_t offset = 0;  // in the file
    std::byte* at = nullptr;
    int64_t bytes = 0;   // still to move
  };

  void make_file(const std::string& folder, int64_t bytes, std::string& remarks);
  void start(bool write, int64_t offset, std::byte* at, int64_t bytes, uint64_t tag);
  void submit(size_t slot);
  void reap();  // waits for one piece

  int64_t bytes_ = 0, moved_bytes_ = 0;
  Faults faults_;
  std::string words_;
  std::deque<File> files_;  // one a folder
  std::vector<Piece> pieces_;
  std::vector<size_t> free_;  // slots of pieces_ that are not in flight
  std::deque<std::shared_ptr<Request>> finished_;
  std::unique_ptr<DiskQueue> queue_;
};

}  // namespace uly::memory
