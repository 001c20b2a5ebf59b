// Model folders in the Hugging Face layout: config.json, safetensors weights in one file or several with an index, tokenizer.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/safetensors.h"
#include "models/spec.h"

namespace uly::checkpoint {

// The weights of a model, mapped; nothing is read before it is asked for. Only safetensors files are opened: pickled
// weights run code.
class HubReader {
 public:
  // Opens the weights in `folder` and checks them against models::units(spec). Throws UserError naming file and tensor:
  // no weights, an index that names a missing file, a tensor that is missing, has another shape, or is not F32, BF16, F16.
  // With tied embeddings lm_head.weight may be absent, may stand in for the embedding, or must equal it.
  HubReader(const std::string& folder, const models::Spec& spec);

  // Fills `out` with elements [first_element, first_element + count) of `unit`'s flat buffer, as fp32; gaps are zero.
  //
  // Memory      none beyond `out`; pages of the files come and go as the system likes
  void read(const models::Unit& unit, int64_t first_element, int64_t count, float* out) const;

  // By which other weights are told from these: a hash of each tensor's name, dtype and shape, and of its bytes: all of a small
  // one, eight blocks of 4 KiB of another, the first and the last among them.
  std::string fingerprint(const std::vector<models::Unit>& units) const;

 private:
  const TensorEntry* find(const std::string& name) const;
  const TensorEntry& at(const models::Tensor& tensor) const;
  void open_indexed(const std::string& index_path);
  void check(const models::Spec& spec);

  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const TensorEntry*> tensors_;
  std::map<std::string, std::string> path_of_;  // tensor -> file, for messages
};

// Throws UserError if a model must not be saved at `folder`: it is where `spec` was read from (or holds that), or it is
// something there that this program did not write. Call it before training, so that no finished run meets it.
void check_hub_target(const models::Spec& spec, const std::string& folder);

// Makes the folder in which saved models are to lie, and throws UserError if it cannot be written or has no room for one.
void check_hub_room(const models::Spec& spec, Dtype dtype, const std::string& output_dir);

struct HubWriterOptions {
  std::string folder;            // where the model shall lie
  Dtype dtype = Dtype::kBf16;    // of the files and of what is appended: kBf16 or kF32
  std::string tokenizer_folder;  // tokenizer files and chat template are copied from here; empty: none
  int64_t max_file_bytes = 5'000'000'000;
};

// Writes a model folder as a stream. All goes to `<folder>.incomplete`, is flushed to disk, and takes the name `folder`
// at once in finish(); an earlier save there stays whole until then, and files in it that are not ours move over. A
// writer that is destroyed unfinished removes what it wrote.
class HubWriter {
 public:
  // Throws UserError: what check_hub_target throws; too little room on disk.
  HubWriter(const models::Spec& spec, HubWriterOptions options);
  ~HubWriter();
  HubWriter(const HubWriter&) = delete;
  HubWriter& operator=(const HubWriter&) = delete;

  // Takes the next `count` elements, in options.dtype, of the flat buffers of models::units(spec), unit after unit, gaps
  // included (they are dropped), in pieces of any size.
  void append(const void* data, int64_t count);

  // Checks that every unit was appended, completes the folder and puts it in its place.
  void finish();

 private:
  // One stretch of the stream: a tensor, or a gap (tensor == nullptr).
  struct Stretch {
    const models::Tensor* tensor;
    int64_t elements;
    int64_t file;
  };
  void plan_files();
  void open_file(int64_t file);
  void check_room() const;
  void write_small_files() const;

  models::Spec spec_;
  HubWriterOptions options_;
  std::string incomplete_;
  std::vector<models::Unit> units_;
  std::vector<Stretch> stretches_;
  std::vector<std::vector<const models::Tensor*>> files_;
  size_t stretch_ = 0;  // the stretch now being filled
  int64_t filled_ = 0;  // elements of it that came
  int64_t open_ = -1;   // file now open
  std::unique_ptr<SafetensorsWriter> writer_;
  bool finished_ = false;
};

}  // namespace uly::checkpoint
