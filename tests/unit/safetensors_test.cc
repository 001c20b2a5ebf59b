#include "base/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "base/check.h"

namespace uly {
namespace {

namespace fs = std::filesystem;

class SafetensorsTest : public testing::Test {
 protected:
  SafetensorsTest() {
    std::string name = (fs::temp_directory_path() / "safetensors_test.XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~SafetensorsTest() override { fs::remove_all(folder_); }

  std::string path() const { return (folder_ / "file.safetensors").string(); }

  // Writes a file of this header and so many zero bytes of data.
  void write(const std::string& header, int64_t data_bytes, int64_t claimed_header = -1) const {
    std::ofstream file(path(), std::ios::binary);
    const uint64_t size = claimed_header < 0 ? header.size() : static_cast<uint64_t>(claimed_header);
    file.write(reinterpret_cast<const char*>(&size), 8);
    file << header << std::string(static_cast<size_t>(data_bytes), '\0');
  }

  // Returns what opening the file says; it must be a UserError that begins with the path.
  std::string complaint() const {
    try {
      const SafetensorsFile file(path());
    } catch (const UserError& error) {
      const std::string text = error.what();
      EXPECT_EQ(text.rfind(path() + ": ", 0), 0u) << text;
      return text.substr(path().size() + 2);
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(SafetensorsTest, WhatIsWrittenInPiecesIsRead) {
  std::vector<float> a(6);
  std::iota(a.begin(), a.end(), 1.0f);
  const std::vector<uint8_t> b = {7, 8, 9};
  SafetensorsWriter writer(path(), {{"a", Dtype::kF32, {2, 3}}, {"none", Dtype::kI64, {0, 4}}, {"b", Dtype::kU8, {3}}, {"scalar", Dtype::kU8, {}}},
                           {{"format", "test"}});
  writer.append(a.data(), 5);
  writer.append(reinterpret_cast<const char*>(a.data()) + 5, 19);
  writer.append(b.data(), 3);
  writer.append(b.data(), 1);
  writer.finish();

  const SafetensorsFile file(path());
  EXPECT_EQ(file.metadata().at("format"), "test");
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.at("a").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(std::memcmp(file.at("a").data, a.data(), 24), 0);
  EXPECT_EQ(file.at("a").elements(), 6);
  EXPECT_EQ(file.at("none").bytes, 0);
  EXPECT_EQ(file.at("b").data[2], 9);
  EXPECT_EQ(file.at("scalar").elements(), 1);
  EXPECT_EQ(file.find("c"), nullptr);
  EXPECT_THROW(file.at("c"), UserError);
}

TEST_F(SafetensorsTest, DataStartsAtAMultipleOfEight) {
  for (const std::string name : {"a", "ab", "abc", "abcdefgh"}) {
    SafetensorsWriter writer(path(), {{name, Dtype::kI64, {1}}}, {});
    const int64_t value = 5;
    writer.append(&value, 8);
    writer.finish();
    EXPECT_EQ(fs::file_size(path()) % 8, 0u);
    int64_t read = 0;
    const SafetensorsFile file(path());
    std::memcpy(&read, file.at(name).data, 8);
    EXPECT_EQ(read, 5);
  }
}

TEST_F(SafetensorsTest, LyingHeadersAreRefused) {
  const struct {
    const char* header;
    int64_t data_bytes;
    const char* says;
  } kCases[] = {
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "truncated: header says 8 bytes of data, file has 4"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 9, "header says 8 bytes of data, file has 9"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, "takes 12 bytes, data_offsets are [0, 8]"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "takes 8 bytes"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6, "inside the one before"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}})", 9, "nothing describes bytes 4 to 5"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}})", 5, "nothing describes bytes 0 to 1"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, "'a' is named twice"},
      {R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, "'dtype' is named twice"},
      {R"({"a":{"dtype":"F99","shape":[1],"data_offsets":[0,1]}})", 1, "found F99"},
      {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "expected a whole number"},
      {R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, "expected a whole number"},
      {R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "larger than any file"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551615]}})", 1, "expected a whole number"},
      {R"({"a":{"dtype":"U8","shape":[1]}})", 1, "expected dtype, shape and data_offsets"},
      {R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,1]}})", 1, "dtype as text"},
      {R"({"a":[[[[[1]]]]]})", 0, "nested deeper"},
      {R"({"__metadata__":{"a":1}})", 0, "expected __metadata__ 'a' as text"},
      {R"({"a":)", 0, "not JSON"},
      {R"([])", 0, "expected a JSON object, found array"},
      {"", 0, "not JSON"},
      {"\xff\xfe", 0, "not JSON"},
  };
  for (const auto& one : kCases) {
    write(one.header, one.data_bytes);
    const std::string text = complaint();
    EXPECT_NE(text.find(one.says), std::string::npos) << one.header << "\n" << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  }
}

TEST_F(SafetensorsTest, HeaderSizesBeyondTheFileAreRefused) {
  write("{}", 0, 3);
  EXPECT_NE(complaint().find("truncated: it claims a header of 3 bytes, file has 2"), std::string::npos);
  write("{}", 0, 100'000'001);
  EXPECT_NE(complaint().find("the format allows 100,000,000"), std::string::npos);
  write("{}", 0, std::numeric_limits<int64_t>::max());
  EXPECT_NE(complaint().find("not a safetensors file"), std::string::npos);
  std::ofstream(path()) << "short";
  EXPECT_NE(complaint().find("expected at least 8 bytes, found 5"), std::string::npos);
  std::ofstream(path()).flush();
  EXPECT_NE(complaint().find("expected at least 8 bytes, found 0"), std::string::npos);
  fs::remove(path());
  EXPECT_NE(complaint().find("cannot be opened: No such file"), std::string::npos);
  fs::create_directory(path());
  EXPECT_NE(complaint().find("found a folder"), std::string::npos);
}

TEST_F(SafetensorsTest, AnyTruncationIsSeen) {
  SafetensorsWriter writer(path(), {{"a", Dtype::kU8, {5}}, {"b", Dtype::kU8, {3}}}, {});
  writer.append("12345678", 8);
  writer.finish();
  for (auto size = static_cast<int64_t>(fs::file_size(path())) - 1; size >= 0; --size) {
    fs::resize_file(path(), static_cast<uintmax_t>(size));
    EXPECT_NE(complaint(), "") << size;
  }
}

TEST_F(SafetensorsTest, TensorsBeyondTwoGibibytesHaveTheirPlaces) {
  const int64_t large = (int64_t{3} << 30) + 1;
  write(fmt::format(R"({{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}},"b":{{"dtype":"U8","shape":[4],"data_offsets":[{0},{1}]}}}})", large,
                    large + 4),
        0);
  const int64_t header_end = static_cast<int64_t>(fs::file_size(path()));
  fs::resize_file(path(), static_cast<uintmax_t>(header_end + large + 4));  // a hole: takes no room
  std::fstream(path(), std::ios::in | std::ios::out | std::ios::binary).seekp(header_end + large).write("last", 4);
  const SafetensorsFile file(path());
  EXPECT_EQ(file.at("a").bytes, large);
  EXPECT_EQ(std::memcmp(file.at("b").data, "last", 4), 0);
}

TEST_F(SafetensorsTest, AnUnfinishedFileIsRemoved) {
  {
    SafetensorsWriter writer(path(), {{"a", Dtype::kU8, {5}}}, {});
    writer.append("12", 2);
    EXPECT_THROW(writer.append("345678", 6), InternalError);
    EXPECT_THROW(writer.finish(), InternalError);
    EXPECT_TRUE(fs::exists(path()));
  }
  EXPECT_FALSE(fs::exists(path()));
}

TEST_F(SafetensorsTest, AFullDiskIsNamedWithWhatIsNeeded) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  try {
    SafetensorsWriter writer("/dev/full", {{"a", Dtype::kU8, {1'000'000}}}, {});
    writer.append(std::string(1'000'000, 'a').data(), 1'000'000);
    writer.finish();
    FAIL() << "/dev/full took it";
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()).rfind("/dev/full: no room on disk: needs 1,000,0", 0), 0u) << error.what();
  }
  EXPECT_TRUE(fs::exists("/dev/full"));
}

TEST_F(SafetensorsTest, MoreThanTheDiskHoldsIsRefusedAtOnce) {
  try {
    SafetensorsWriter writer(path(), {{"a", Dtype::kU8, {int64_t{1} << 50}}}, {});
    FAIL() << "a pebibyte fits here";
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()).rfind(path() + ": no room on disk: needs 1,125,899,906,842,", 0), 0u) << error.what();
  }
  EXPECT_FALSE(fs::exists(path()));
}

}  // namespace
}  // namespace uly
