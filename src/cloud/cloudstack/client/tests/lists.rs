use serde::Deserialize;

use super::*;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct Row {
    id: String,
}

fn page(count: usize, ids: impl IntoIterator<Item = usize>) -> Act {
    let rows: Vec<Value> = ids.into_iter().map(|n| json!({"id": n.to_string(), "size": 1u64 << 60})).collect();
    Act::json(200, &json!({"listvolumesresponse": {"count": count, "volume": rows}}).to_string())
}

async fn list(b: &Bench) -> Result<Vec<Row>, ApiError> {
    b.shown(b.client.list("listVolumes", &[("zoneid", "z")], "volume").await)
}

fn numbers(rows: Vec<Row>) -> Vec<usize> {
    rows.into_iter().map(|r| r.id.parse().unwrap()).collect()
}

#[tokio::test]
async fn no_match_is_an_empty_list() {
    for body in [r#"{"listvolumesresponse":{}}"#, r#"{"listvolumesresponse":{"count":0}}"#] {
        let b = Bench::new(vec![Act::json(200, body)]);
        assert_eq!(list(&b).await.unwrap(), []);
        assert_eq!(b.server.requests().len(), 1);
    }
}

#[tokio::test]
async fn all_pages_are_read() {
    let b = Bench::new(vec![page(1203, 0..500), page(1203, 500..1000), page(1203, 1000..1203)]);
    assert_eq!(numbers(list(&b).await.unwrap()), (0..1203).collect::<Vec<_>>());
    let asked: Vec<(String, String)> =
        b.server.requests().iter().map(|f| (f["page"].clone(), f["pagesize"].clone())).collect();
    assert_eq!(asked, [("1", "500"), ("2", "500"), ("3", "500")].map(|(p, s)| (p.into(), s.into())));
    assert!(b.server.requests().iter().all(|f| f["zoneid"] == "z"));
    let b = Bench::new(vec![page(500, 0..500)]);
    assert_eq!(list(&b).await.unwrap().len(), 500);
    assert_eq!(b.server.requests().len(), 1, "a full last page needs no further one");
}

#[tokio::test]
async fn a_row_that_moved_between_two_pages_is_found_by_reading_again() {
    // A creation pushes 499 to the second page: it is met twice, and the new one never.
    let b =
        Bench::new(vec![page(501, 0..500), page(502, 499..501), page(502, (0..499).chain([777])), page(502, 499..501)]);
    let mut got = numbers(list(&b).await.unwrap());
    got.sort_unstable();
    assert_eq!(got, (0..501).chain([777]).collect::<Vec<_>>());
    assert_eq!(b.server.requests().len(), 4);
}

#[tokio::test]
async fn a_list_that_never_agrees_is_no_answer() {
    let b = Bench::new(vec![page(3, [1, 2]), page(3, [2, 3]), page(3, [1, 3])]);
    assert!(no_answer(list(&b).await).contains("changed during each"));
    assert_eq!(b.server.requests().len(), 3);
}

#[tokio::test]
async fn rows_that_stay_the_same_are_believed_against_a_wrong_count() {
    let b = Bench::new(vec![page(3, [1, 2])]);
    assert_eq!(numbers(list(&b).await.unwrap()), [1, 2]);
    assert_eq!(b.server.requests().len(), 3);
    assert!(b.printed.text().contains("the same 2"), "{}", b.printed.text());
}

#[tokio::test]
async fn a_lower_limit_of_the_server_is_learnt() {
    let refusal = r#"{"r":{"errorcode":431,"errortext":"Page size can't exceed max allowed page size value: 2"}}"#;
    let b = Bench::new(vec![Act::json(431, refusal), page(3, [1, 2]), page(3, [3]), page(3, [1, 2]), page(3, [3])]);
    assert_eq!(numbers(list(&b).await.unwrap()), [1, 2, 3]);
    assert_eq!(numbers(list(&b).await.unwrap()), [1, 2, 3]);
    let sizes: Vec<String> = b.server.requests().iter().map(|f| f["pagesize"].clone()).collect();
    assert_eq!(sizes, ["500", "2", "2", "2", "2"]);
}

#[tokio::test]
async fn a_server_without_paging_does_not_hold_us_for_ever() {
    let b = Bench::new(vec![page(600, 0..500)]);
    assert_eq!(list(&b).await.unwrap().len(), 500);
    assert_eq!(b.server.requests().len(), 6);
}

#[tokio::test]
async fn an_error_on_a_page_is_the_lists() {
    let refusal = r#"{"r":{"errorcode":531,"errortext":"no"}}"#;
    let b = Bench::new(vec![page(600, 0..500), Act::json(531, refusal)]);
    assert!(matches!(list(&b).await.unwrap_err(), ApiError::Api { code: 531, .. }));
}

#[tokio::test]
async fn a_row_of_another_form_is_no_answer() {
    let b = Bench::new(vec![Act::json(200, r#"{"r":{"count":1,"volume":[{"id":7}]}}"#)]);
    assert!(no_answer(list(&b).await).contains("volume in a form"));
}
