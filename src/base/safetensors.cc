#include "base/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <limits>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/shapes.h"
#include "base/units.h"

namespace uly {
namespace {

constexpr int64_t kSizeBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kBlock = 4096;                  // what a write past the page cache consists of
constexpr int64_t kWaiting = int64_t{4} << 20;    // is gathered before it is written
constexpr int kMaxDepth = 3;                      // header, tensor, list of numbers

// Sorted, unlike Json: a hostile header of a million names is read in no time too.
using Header = nlohmann::json;

// Returns what the file system of `path` has room for; more than anything where it does not say.
int64_t free_bytes(const std::string& path) {
  struct statvfs room {};
  const std::string folder = std::filesystem::path(path).parent_path().string();
  int64_t bytes = 0;
  const bool said = ::statvfs(folder.empty() ? "." : folder.c_str(), &room) == 0 && room.f_blocks > 0 &&
                    !__builtin_mul_overflow(static_cast<int64_t>(room.f_bavail), static_cast<int64_t>(room.f_frsize), &bytes);
  return said ? bytes : std::numeric_limits<int64_t>::max();
}

std::string cause() { return std::strerror(errno); }

// By errno: what a user mends (no such file, no permission), or a device that may do better later (too many open files, a lost server).
[[noreturn]] void refused(const std::string& path, const char* what) {
  constexpr int kUsers[] = {ENOENT, ENOTDIR, EACCES, EPERM, ELOOP, ENAMETOOLONG, EISDIR, ENXIO, EINVAL};
  const std::string words = fmt::format("{}: cannot be {}: {}", path, what, cause());
  if (std::find(std::begin(kUsers), std::end(kUsers), errno) == std::end(kUsers)) throw DeviceError(words);
  throw UserError(words);
}

// Reads the header's text; a key written twice or a nesting that no header has ends it.
Header parse_header(const std::string& path, const char* text, int64_t bytes) {
  std::vector<std::set<std::string>> seen(kMaxDepth + 2);
  const auto check = [&](int depth, Header::parse_event_t event, Header& value) {
    ULY_USER_CHECK(depth <= kMaxDepth, "{}: corrupt header: nested deeper than a safetensors header is", path);
    if (event == Header::parse_event_t::object_start) seen[static_cast<size_t>(depth) + 1].clear();
    if (event == Header::parse_event_t::key) {
      const std::string name = value.get<std::string>();
      ULY_USER_CHECK(seen[static_cast<size_t>(depth)].insert(name).second, "{}: corrupt header: '{}' is named twice", path, name);
    }
    return true;
  };
  try {
    Header header = Header::parse(text, text + bytes, check);
    ULY_USER_CHECK(header.is_object(), "{}: corrupt header: expected a JSON object, found {}", path, header.type_name());
    return header;
  } catch (const Header::exception& error) {
    user_error("{}: corrupt header: not JSON: {}", path, error.what());
  }
}

// Returns the number at `value`, which must be a whole one, not negative, within int64.
int64_t whole_number(const Header& value, const std::string& where) {
  ULY_USER_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
                 "{}: expected a whole number of at least 0, found {}", where, value.dump(-1, ' ', true, Header::error_handler_t::replace));
  return value.get<int64_t>();
}

struct Claim {
  TensorEntry entry;
  int64_t begin = 0, end = 0;
};

// Reads one tensor of the header; its place is checked against shape and dtype, not yet against the file.
Claim read_claim(const std::string& path, const std::string& name, const Header& value) {
  const std::string where = fmt::format("{}: corrupt header: tensor '{}'", path, name);
  ULY_USER_CHECK(value.is_object() && value.contains("dtype") && value.contains("shape") && value.contains("data_offsets"),
                 "{}: expected dtype, shape and data_offsets", where);
  const Header &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  ULY_USER_CHECK(dtype.is_string() && shape.is_array() && offsets.is_array() && offsets.size() == 2,
                 "{}: expected dtype as text, shape as a list and data_offsets as two numbers", where);
  Claim claim;
  claim.entry.name = name;
  claim.entry.dtype = dtype_from_name(dtype.get<std::string>(), fmt::format("{}: tensor '{}'", path, name));
  int64_t bytes = bytes_of(claim.entry.dtype);
  for (const Header& size : shape) {
    claim.entry.shape.push_back(whole_number(size, where + ": shape"));
    ULY_USER_CHECK(!__builtin_mul_overflow(bytes, claim.entry.shape.back(), &bytes), "{}: shape {} is larger than any file", where, shape.dump());
  }
  claim.begin = whole_number(offsets[0], where + ": data_offsets");
  claim.end = whole_number(offsets[1], where + ": data_offsets");
  ULY_USER_CHECK(claim.begin <= claim.end && claim.end - claim.begin == bytes, "{}: shape {} of {} takes {} bytes, data_offsets are [{}, {}]", where,
                 shape.dump(), name_of(claim.entry.dtype), format_count(bytes), claim.begin, claim.end);
  claim.entry.bytes = bytes;
  return claim;
}

// Checks that the tensors lie one after the other and fill the file's data to the byte.
void check_places(const std::string& path, std::vector<Claim>& claims, int64_t data_bytes) {
  std::sort(claims.begin(), claims.end(), [](const Claim& a, const Claim& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  int64_t end = 0;
  for (const Claim& claim : claims) {
    ULY_USER_CHECK(claim.begin >= end, "{}: corrupt header: tensor '{}' starts at byte {}, inside the one before it, which ends at {}", path, claim.entry.name,
                   format_count(claim.begin), format_count(end));
    ULY_USER_CHECK(claim.begin == end, "{}: corrupt header: nothing describes bytes {} to {}, before tensor '{}'", path, format_count(end),
                   format_count(claim.begin), claim.entry.name);
    end = claim.end;
  }
  ULY_USER_CHECK(end <= data_bytes, "{}: truncated: header says {} bytes of data, file has {}", path, format_count(end), format_count(data_bytes));
  ULY_USER_CHECK(end == data_bytes, "{}: corrupt: header says {} bytes of data, file has {}", path, format_count(end), format_count(data_bytes));
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) refused(path, "opened");
  struct stat status {};
  const bool known = ::fstat(fd, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    ::close(fd);
    user_error("{}: expected a file, found {}", path, known && S_ISDIR(status.st_mode) ? "a folder" : "something that cannot be mapped");
  }
  size_ = status.st_size;
  void* data = size_ == 0 ? nullptr : ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_SHARED, fd, 0);
  const int error = errno;
  ::close(fd);
  errno = error;
  if (data == MAP_FAILED) refused(path, "mapped");
  data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  ULY_USER_CHECK(file_.size() >= kSizeBytes, "{}: not a safetensors file: expected at least 8 bytes, found {}", path, file_.size());
  uint64_t claimed = 0;
  std::memcpy(&claimed, file_.data(), sizeof claimed);
  ULY_USER_CHECK(claimed <= static_cast<uint64_t>(kMaxHeaderBytes), "{}: not a safetensors file: it claims a header of {} bytes, the format allows {}", path,
                 claimed, format_count(kMaxHeaderBytes));
  const int64_t header_bytes = static_cast<int64_t>(claimed);
  ULY_USER_CHECK(header_bytes <= file_.size() - kSizeBytes, "{}: truncated: it claims a header of {} bytes, file has {}", path, format_count(header_bytes),
                 format_count(file_.size() - kSizeBytes));
  const Header header = parse_header(path, reinterpret_cast<const char*>(file_.data()) + kSizeBytes, header_bytes);

  std::vector<Claim> claims;
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") {
      claims.push_back(read_claim(path, name, value));
      continue;
    }
    ULY_USER_CHECK(value.is_object(), "{}: corrupt header: expected __metadata__ as an object of texts", path);
    for (const auto& [key, text] : value.items()) {
      ULY_USER_CHECK(text.is_string(), "{}: corrupt header: expected __metadata__ '{}' as text", path, key);
      metadata_[key] = text.get<std::string>();
    }
  }
  check_places(path, claims, file_.size() - kSizeBytes - header_bytes);
  for (Claim& claim : claims) {
    claim.entry.data = file_.data() + kSizeBytes + header_bytes + claim.begin;
    const std::string name = claim.entry.name;
    tensors_[name] = std::move(claim.entry);
  }
}

const TensorEntry* SafetensorsFile::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const TensorEntry& SafetensorsFile::at(const std::string& name) const {
  const TensorEntry* entry = find(name);
  ULY_USER_CHECK(entry != nullptr, "{}: tensor '{}' is missing", path(), name);
  return *entry;
}

SafetensorsWriter::SafetensorsWriter(std::string path, const std::vector<Declared>& tensors, const std::map<std::string, std::string>& metadata)
    : path_(std::move(path)) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t end = 0;
  std::set<std::string> names;
  for (const Declared& tensor : tensors) {
    ULY_CHECK(names.insert(tensor.name).second, "a tensor is declared twice");
    int64_t bytes = bytes_of(tensor.dtype);
    for (int64_t size : tensor.shape) ULY_CHECK(size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes), "shape of " + tensor.name);
    const int64_t begin = end;
    ULY_CHECK(!__builtin_add_overflow(begin, bytes, &end), "bytes of all tensors");
    header[tensor.name] = {{"dtype", name_of(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.resize(static_cast<size_t>(round_up(static_cast<int64_t>(text.size()), kSizeBytes)), ' ');
  ULY_USER_CHECK(static_cast<int64_t>(text.size()) <= kMaxHeaderBytes, "{}: header would take {} bytes, the format allows {}", path_,
                 format_count(static_cast<int64_t>(text.size())), format_count(kMaxHeaderBytes));
  const uint64_t header_bytes = text.size();
  text.insert(0, reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes);

  total_bytes_ = static_cast<int64_t>(text.size()) + end;
  remaining_bytes_ = total_bytes_;
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  ULY_USER_CHECK(fd_ >= 0, "{}: cannot be written: {}", path_, cause());
  if (free_bytes(path_) < total_bytes_) fail(ENOSPC);
  // Claims the room now where a file system can, so that a full disk is known before the work. The size grows with what
  // is written all the same: a file that a crash leaves behind is seen to be truncated.
  if (::fallocate(fd_, FALLOC_FL_KEEP_SIZE, 0, total_bytes_) != 0 && (errno == ENOSPC || errno == EDQUOT)) fail(errno);
  waiting_.reset(static_cast<char*>(std::aligned_alloc(kBlock, kWaiting)));
  ULY_CHECK(waiting_ != nullptr, "memory for what waits to be written");
  set_direct(true);
  append(text.data(), static_cast<int64_t>(text.size()));
}

SafetensorsWriter::~SafetensorsWriter() { discard(); }

void SafetensorsWriter::append(const void* data, int64_t bytes) {
  ULY_CHECK(fd_ >= 0, "append to a file that is closed");
  ULY_CHECK(bytes >= 0 && bytes <= remaining_bytes_, "more bytes than were declared for " + path_);
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const int64_t n = std::min(bytes, kWaiting - waiting_bytes_);
    std::memcpy(waiting_.get() + waiting_bytes_, next, static_cast<size_t>(n));
    waiting_bytes_ += n, remaining_bytes_ -= n, next += n, bytes -= n;
    if (waiting_bytes_ == kWaiting) flush();
  }
}

void SafetensorsWriter::flush() {
  for (int64_t done = 0; done < waiting_bytes_;) {
    // Blocks only go past the page cache: not the end of the file, nor what a write has left of a block.
    const int64_t left = waiting_bytes_ - done, blocks = left / kBlock * kBlock;
    if (direct_ && (blocks == 0 || done % kBlock != 0)) set_direct(false);
    const ssize_t written = ::write(fd_, waiting_.get() + done, static_cast<size_t>(direct_ ? blocks : left));
    if (written >= 0) done += written;
    else if (errno == EINVAL && direct_) set_direct(false);  // a file system that wants larger blocks
    else if (errno != EINTR) fail(errno);
  }
  waiting_bytes_ = 0;
}

void SafetensorsWriter::set_direct(bool direct) {
  const int flags = ::fcntl(fd_, F_GETFL);
  direct_ = ::fcntl(fd_, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0 && direct;
}

void SafetensorsWriter::Free::operator()(char* block) const { std::free(block); }

void SafetensorsWriter::finish() {
  ULY_CHECK(fd_ >= 0, "finish of a file that is closed");
  ULY_CHECK_EQ(remaining_bytes_, 0, "bytes declared and not written");
  flush();
  if (::fsync(fd_) != 0 && errno != EINVAL) fail(errno);
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0 && errno != EINTR) {
    const std::string why = cause();
    ::unlink(path_.c_str());
    user_error("{}: cannot be written: {}", path_, why);
  }
}

void SafetensorsWriter::fail(int error) {
  discard();
  ULY_USER_CHECK(error != ENOSPC && error != EDQUOT, "{}: no room on disk: needs {} bytes, {} are free", path_, format_count(total_bytes_),
                 format_count(free_bytes(path_)));
  user_error("{}: cannot be written: {}", path_, std::strerror(error));
}

void SafetensorsWriter::discard() {
  if (fd_ < 0) return;
  struct stat status {};
  const bool regular = ::fstat(fd_, &status) == 0 && S_ISREG(status.st_mode);  // a device such as /dev/full stays
  ::close(std::exchange(fd_, -1));
  if (regular) ::unlink(path_.c_str());
}

}  // namespace uly
