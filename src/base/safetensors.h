// Reads and writes safetensors files: an 8-byte little-endian header size, a JSON header, then raw little-endian data.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/json.h"

namespace uly {

// A file mapped read-only. Throws UserError if it cannot be opened or mapped.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

struct TensorEntry {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // into the mapping
  int64_t bytes = 0;
  int64_t elements() const { return bytes / bytes_of(dtype); }
};

// An open safetensors file. The constructor checks everything that the header claims against the file's size and
// throws UserError ("PATH: truncated: header says 1,234 bytes of data, file has 1,000") for any lie.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }
  const TensorEntry* find(const std::string& name) const;           // nullptr if absent
  const TensorEntry& at(const std::string& name) const;             // throws UserError naming file and tensor
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile file_;
  std::map<std::string, TensorEntry> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes one file as a stream: declare all tensors, then append their bytes in the declared order, in any number of
// pieces; finish() checks that all were written, fsyncs and closes. Throws UserError naming path and cause ("no room
// on disk") when the system refuses; the partial file is then removed.
class SafetensorsWriter {
 public:
  struct Declared {
    std::string name;
    Dtype dtype;
    std::vector<int64_t> shape;
  };
  SafetensorsWriter(std::string path, const std::vector<Declared>& tensors, const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  void append(const void* data, int64_t bytes);
  void finish();

 private:
  void flush();                       // writes what waits
  void set_direct(bool direct);
  [[noreturn]] void fail(int error);  // removes the partial file and throws
  void discard();                     // closes and removes a file that is not finished

  std::string path_;
  int fd_ = -1;
  int64_t total_bytes_ = 0, remaining_bytes_ = 0;
  struct Free {
    void operator()(char* block) const;
  };
  std::unique_ptr<char, Free> waiting_;  // what is not written yet, and how much of it there is
  int64_t waiting_bytes_ = 0;
  bool direct_ = false;                  // past the page cache, which costs more of a core than the copy to what waits
};

}  // namespace uly
