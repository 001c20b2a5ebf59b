// The files around the weights of a saved model, and how a folder takes its place.
#pragma once

#include <string>

#include "base/dtype.h"
#include "base/json.h"
#include "models/spec.h"

namespace uly::checkpoint {

// In the metadata of every weights file that HubWriter writes: a folder so marked may be replaced by a later save.
inline constexpr const char* kWriterKey = "written_by";
inline constexpr const char* kWriterName = "ulysses-plus";

// Returns config.json's content in the spelling that Transformers 4 and 5 both read (rope_theta and rope_scaling beside
// the dimensions), with `dtype` as what the files hold.
Json config_to_save(const models::Spec& spec, Dtype dtype);

bool is_generation_file(const std::string& name);
bool is_tokenizer_file(const std::string& name);  // tokenizers of all kinds, their vocabularies and chat templates
bool is_weights_file(const std::string& name);

// Copies what `wanted` accepts of a folder's files, flushed to disk; symbolic links are followed.
void copy_files(const std::string& from, const std::string& to, bool (*wanted)(const std::string& name));

// Writes and flushes a file. Throws UserError if the system refuses.
void write_file(const std::string& path, const std::string& content);

// Returns `folder` without slashes at its end; where it is a symbolic link, the folder it leads to.
std::string settled(const std::string& folder);

void make_folder(const std::string& folder);    // with its parents
void remove_folder(const std::string& folder);  // nothing happens where there is none
void sync_folder(const std::string& folder);

// Gives `complete` the name `folder`, in one step where the file system can exchange two names. What lay there before goes,
// but for files that are no part of a saved model: they move into the new folder.
void put_in_place(const std::string& complete, const std::string& folder);

}  // namespace uly::checkpoint
