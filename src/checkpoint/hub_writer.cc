#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "base/check.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "checkpoint/hub_files.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

std::string file_name(int64_t file, int64_t num_files) {
  return num_files == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", file + 1, num_files);
}

// Splits tensors into files as Transformers does: in order, a new file where the next tensor would pass the limit.
std::vector<std::vector<const models::Tensor*>> split(const std::vector<models::Unit>& units, int64_t bytes_each, int64_t max_file_bytes) {
  std::vector<std::vector<const models::Tensor*>> files(1);
  int64_t bytes = 0;
  for (const models::Unit& unit : units)
    for (const models::Tensor& tensor : unit.tensors) {
      const int64_t more = tensor.elements() * bytes_each;
      if (!files.back().empty() && bytes + more > max_file_bytes) {
        files.emplace_back();
        bytes = 0;
      }
      files.back().push_back(&tensor);
      bytes += more;
    }
  return files;
}

// Says that the disk of `folder` has no room for a saved model; empty where it has, or where the disk does not tell.
std::string lacks_room(const models::Spec& spec, Dtype dtype, const std::string& folder) {
  const int64_t margin = 64 << 20;  // headers, index, tokenizer
  const int64_t needed = models::num_parameters(spec) * bytes_of(dtype) + margin;
  struct statvfs room {};
  if (::statvfs(folder.c_str(), &room) != 0) return "";
  const int64_t available = static_cast<int64_t>(room.f_bavail) * static_cast<int64_t>(room.f_frsize);
  return available >= needed ? "" : fmt::format("no room on disk: needs {}, {} are free", format_bytes(needed), format_bytes(available));
}

}  // namespace

HubWriter::HubWriter(const models::Spec& spec, HubWriterOptions options) : spec_(spec), options_(std::move(options)), units_(models::units(spec)) {
  ULY_CHECK(options_.dtype == Dtype::kBf16 || options_.dtype == Dtype::kF32, "dtype of a saved model");
  check_hub_target(spec_, options_.folder);
  options_.folder = settled(options_.folder);
  incomplete_ = options_.folder + ".incomplete";
  plan_files();
  remove_folder(incomplete_);  // what an interrupted save left
  make_folder(incomplete_);
  check_room();
}

HubWriter::~HubWriter() {
  writer_.reset();
  std::error_code ignored;
  if (!finished_) fs::remove_all(incomplete_, ignored);
}

void HubWriter::plan_files() {
  files_ = split(units_, bytes_of(options_.dtype), options_.max_file_bytes);
  int64_t file = 0;
  size_t next = 0;  // within the file
  for (const models::Unit& unit : units_) {
    int64_t end = 0;
    for (const models::Tensor& tensor : unit.tensors) {
      if (next == files_[static_cast<size_t>(file)].size()) ++file, next = 0;
      ++next;
      if (tensor.offset > end) stretches_.push_back({nullptr, tensor.offset - end, file});
      stretches_.push_back({&tensor, tensor.elements(), file});
      end = tensor.offset + tensor.elements();
    }
    if (unit.elements > end) stretches_.push_back({nullptr, unit.elements - end, file});
  }
}

void HubWriter::check_room() const {
  const std::string lacks = lacks_room(spec_, options_.dtype, incomplete_);
  if (lacks.empty()) return;
  std::error_code ignored;
  fs::remove_all(incomplete_, ignored);
  user_error("{}: {}{}", options_.folder, lacks, fs::exists(options_.folder, ignored) ? "; the earlier save there stays until the new one is complete" : "");
}

void check_hub_room(const models::Spec& spec, Dtype dtype, const std::string& output_dir) {
  make_folder(output_dir);
  ULY_USER_CHECK(::access(output_dir.c_str(), W_OK) == 0, "{}: cannot be written: {}", output_dir, std::strerror(errno));
  const std::string lacks = lacks_room(spec, dtype, output_dir);
  ULY_USER_CHECK(lacks.empty(), "{}: {} for the model that is to be saved; make room or choose another output_dir", output_dir, lacks);
}

void HubWriter::open_file(int64_t file) {
  if (writer_) writer_->finish();
  writer_.reset();
  open_ = file;
  std::vector<SafetensorsWriter::Declared> declared;
  for (const models::Tensor* tensor : files_[static_cast<size_t>(file)]) declared.push_back({tensor->name, options_.dtype, tensor->shape});
  const std::string path = (fs::path(incomplete_) / file_name(file, static_cast<int64_t>(files_.size()))).string();
  writer_ = std::make_unique<SafetensorsWriter>(path, declared, std::map<std::string, std::string>{{"format", "pt"}, {kWriterKey, kWriterName}});
}

void HubWriter::append(const void* data, int64_t count) {
  const int64_t bytes_each = bytes_of(options_.dtype);
  const char* next = static_cast<const char*>(data);
  while (count > 0) {
    ULY_CHECK(stretch_ < stretches_.size(), "more elements than the model has");
    const Stretch& stretch = stretches_[stretch_];
    const int64_t taken = std::min(count, stretch.elements - filled_);
    if (stretch.tensor != nullptr) {
      if (stretch.file != open_) open_file(stretch.file);
      writer_->append(next, taken * bytes_each);
    }
    next += taken * bytes_each;
    count -= taken;
    filled_ += taken;
    if (filled_ == stretch.elements) ++stretch_, filled_ = 0;
  }
}

void HubWriter::write_small_files() const {
  const int64_t num_files = static_cast<int64_t>(files_.size());
  if (num_files > 1) {
    Json names = Json::object();
    for (int64_t file = 0; file < num_files; ++file)
      for (const models::Tensor* tensor : files_[static_cast<size_t>(file)]) names[tensor->name] = file_name(file, num_files);
    const int64_t parameters = models::num_parameters(spec_);
    const Json index = {{"metadata", {{"total_parameters", parameters}, {"total_size", parameters * bytes_of(options_.dtype)}}}, {"weight_map", names}};
    write_file((fs::path(incomplete_) / "model.safetensors.index.json").string(), index.dump(2) + "\n");
  }
  write_file((fs::path(incomplete_) / "config.json").string(), config_to_save(spec_, options_.dtype).dump(2) + "\n");
  if (!spec_.folder.empty()) copy_files(spec_.folder, incomplete_, is_generation_file);
  if (!options_.tokenizer_folder.empty()) copy_files(options_.tokenizer_folder, incomplete_, is_tokenizer_file);
}

void HubWriter::finish() {
  ULY_CHECK_EQ(stretch_, stretches_.size(), "stretches of the model that were appended");
  writer_->finish();
  writer_.reset();
  write_small_files();
  sync_folder(incomplete_);
  finished_ = true;  // what is complete is kept, even where it cannot take its place
  put_in_place(incomplete_, options_.folder);
}

}  // namespace uly::checkpoint
