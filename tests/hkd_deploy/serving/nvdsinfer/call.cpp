// Calls the parser as nvinfer does, from plain C arrays that ctypes can hand over.
#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseCustomHkd(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                                        NvDsInferParseDetectionParams const &,
                                        std::vector<NvDsInferObjectDetectionInfo> &);

// objects: room for rows x 6 floats: class, left, top, width, height, confidence. Gives their number, -1 for a refusal.
extern "C" int call_parser(float *boxes, float *scores, unsigned rows, unsigned sides, int score_type, int named,
                           unsigned width, unsigned height, float threshold, float *objects) {
    NvDsInferLayerInfo box_layer{}, score_layer{};
    box_layer.dataType = FLOAT;
    box_layer.inferDims = {2, {rows, sides}, rows * sides};
    box_layer.layerName = "boxes";
    box_layer.buffer = boxes;
    score_layer.dataType = static_cast<NvDsInferDataType>(score_type);
    score_layer.inferDims = {1, {rows}, rows};
    score_layer.layerName = named ? "scores" : "output0";
    score_layer.buffer = scores;
    NvDsInferParseDetectionParams params;
    params.numClassesConfigured = 1;
    params.perClassPreclusterThreshold = {threshold};
    std::vector<NvDsInferObjectDetectionInfo> found;
    // nvinfer orders layers as the engine does, not as the graph.
    if (!NvDsInferParseCustomHkd({score_layer, box_layer}, {width, height, 3}, params, found)) return -1;
    for (unsigned i = 0; i < found.size(); ++i) {
        float *row = objects + 6 * i;
        row[0] = static_cast<float>(found[i].classId), row[1] = found[i].left, row[2] = found[i].top;
        row[3] = found[i].width, row[4] = found[i].height, row[5] = found[i].detectionConfidence;
    }
    return static_cast<int>(found.size());
}
