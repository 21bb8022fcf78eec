-- Webhooks: where a user's budget events go, and the outbox of deliveries.

-- Tables
-- ------

create table public.webhooks (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    url text not null check (length(url) between 9 and 2000),
    encrypted_secret text not null check (length(encrypted_secret) <= 2000),
    is_active boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    -- A replaced secret signs beside its successor for a while: a receiver need not change both at once.
    previous_encrypted_secret text check (length(previous_encrypted_secret) <= 2000),
    previous_valid_until timestamptz,
    disabled_reason text check (length(disabled_reason) <= 500),
    constraint webhooks_previous_has_end check (
        (previous_encrypted_secret is null) = (previous_valid_until is null))
);
comment on column public.webhooks.disabled_reason is
    'Why the gateway switched it off (410 Gone); null when the user did.';
create index webhooks_user_idx on public.webhooks (user_id);
alter table public.webhooks enable row level security;
revoke all on public.webhooks from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhooks to service_role;
revoke all on sequence public.webhooks_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhooks_id_seq to service_role;

-- The outbox. Settlement writes it in the transaction that reaches the level; the sweep sends it.
create table public.webhook_deliveries (
    id bigint generated always as identity primary key,
    -- Null for a test delivery.
    event_id bigint references public.budget_events (id) on delete cascade,
    webhook_id bigint not null references public.webhooks (id) on delete cascade,
    user_id bigint not null references public.users (id),
    attempts int not null default 0,
    next_attempt_at timestamptz not null default clock_timestamp(),
    delivered_at timestamptz,
    failed_at timestamptz,
    last_status int,
    last_error text check (length(last_error) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint webhook_deliveries_one_end check (delivered_at is null or failed_at is null)
);
create index webhook_deliveries_due_idx on public.webhook_deliveries (next_attempt_at)
    where delivered_at is null and failed_at is null;
create index webhook_deliveries_user_idx on public.webhook_deliveries (user_id, id desc);
create index webhook_deliveries_webhook_idx on public.webhook_deliveries (webhook_id, id desc);
create index webhook_deliveries_event_idx on public.webhook_deliveries (event_id);
alter table public.webhook_deliveries enable row level security;
revoke all on public.webhook_deliveries from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.webhook_deliveries to service_role;
revoke all on sequence public.webhook_deliveries_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.webhook_deliveries_id_seq to service_role;

-- Administration
-- --------------

-- A webhook without its secrets.
create function public.webhook_view(p_webhook public.webhooks) returns jsonb
language sql stable set search_path = '' as $$
    select to_jsonb(p_webhook) - 'user_id' - 'encrypted_secret' - 'previous_encrypted_secret'
$$;
revoke all on function public.webhook_view(public.webhooks) from public, anon, authenticated;
grant execute on function public.webhook_view(public.webhooks) to service_role;

-- p: url, encrypted_secret. Outcomes: created, too_many, not_found.
create function public.create_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif (select count(*) from public.webhooks w where w.user_id = v_user_id) >= 5 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.webhooks (user_id, url, encrypted_secret)
    values (v_user_id, p ->> 'url', p ->> 'encrypted_secret')
    returning * into v_webhook;
    perform public.audit_order(
        p, 'create_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object('url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'created');
end $$;
revoke all on function public.create_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.create_webhook(jsonb) to service_role;

-- p: webhook_id, changes {url, is_active, encrypted_secret}. A replaced secret signs for grace_seconds more.
-- Outcomes: updated, not_found.
create function public.update_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_changes jsonb := p -> 'changes';
    v_now timestamptz := clock_timestamp();
    v_rotates boolean := v_changes ? 'encrypted_secret';
    v_webhook public.webhooks;
begin
    update public.webhooks w set
        url = coalesce(v_changes ->> 'url', w.url),
        is_active = coalesce((v_changes ->> 'is_active')::boolean, w.is_active),
        disabled_reason = case when v_changes ? 'is_active' then null else w.disabled_reason end,
        encrypted_secret = coalesce(v_changes ->> 'encrypted_secret', w.encrypted_secret),
        previous_encrypted_secret =
            case when v_rotates then w.encrypted_secret else w.previous_encrypted_secret end,
        previous_valid_until =
            case when v_rotates then v_now + make_interval(secs => (p ->> 'grace_seconds')::int)
                 else w.previous_valid_until end,
        updated_at = v_now
    where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id returning * into v_webhook;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'update_webhook', 'webhook:' || v_webhook.id, v_user_id, jsonb_build_object(
        'fields', (select jsonb_agg(case f when 'encrypted_secret' then 'secret' else f end)
                   from jsonb_object_keys(v_changes) as f),
        'url', v_webhook.url));
    return public.webhook_view(v_webhook) || jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.update_webhook(jsonb) to service_role;

-- p: webhook_id. Its deliveries go with it. Outcomes: deleted, not_found.
create function public.delete_webhook(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_url text;
begin
    delete from public.webhooks w where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id
    returning w.url into v_url;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(
        p, 'delete_webhook', 'webhook:' || (p ->> 'webhook_id'), v_user_id, jsonb_build_object('url', v_url));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_webhook(jsonb) from public, anon, authenticated;
grant execute on function public.delete_webhook(jsonb) to service_role;

-- p: webhook_id. One test a minute for each webhook. Outcomes: queued, too_soon, inactive, not_found.
create function public.queue_webhook_test(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_webhook public.webhooks;
    v_last timestamptz;
    v_id bigint;
begin
    select * into v_webhook from public.webhooks w
    where w.id = (p ->> 'webhook_id')::bigint and w.user_id = v_user_id;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    elsif not v_webhook.is_active then
        return jsonb_build_object('outcome', 'inactive');
    end if;
    select max(d.created_at) into v_last from public.webhook_deliveries d
    where d.webhook_id = v_webhook.id and d.event_id is null
      and d.created_at > clock_timestamp() - interval '1 minute';
    if v_last is not null then
        return jsonb_build_object(
            'outcome', 'too_soon',
            'retry_after', ceil(extract(epoch from v_last + interval '1 minute' - clock_timestamp()))::int);
    end if;
    insert into public.webhook_deliveries (webhook_id, user_id) values (v_webhook.id, v_user_id)
    returning id into v_id;
    return jsonb_build_object('outcome', 'queued', 'delivery_id', v_id);
end $$;
revoke all on function public.queue_webhook_test(jsonb) from public, anon, authenticated;
grant execute on function public.queue_webhook_test(jsonb) to service_role;

-- Delivery
-- --------

-- Deliveries that are due, or this one if it is. Nobody else gets them before the lease ends, and only a
-- crash lets it end. What is due for a webhook that is switched off has failed.
create function public.claim_deliveries(p_limit int, p_lease_seconds int, p_delivery_id bigint) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_claimed jsonb;
begin
    update public.webhook_deliveries d set failed_at = v_now, last_error = 'the webhook is switched off'
    where d.id in (
        select n.id from public.webhook_deliveries n join public.webhooks w on w.id = n.webhook_id
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now
          and not w.is_active
        limit 1000 for update of n skip locked);
    -- The first delivery of each webhook comes before the second of any: a receiver that never answers must
    -- not keep the others waiting.
    with ranked as (
        select n.id, row_number() over (partition by n.webhook_id order by n.next_attempt_at, n.id) as place
        from public.webhook_deliveries n
        where n.delivered_at is null and n.failed_at is null and n.next_attempt_at <= v_now
          and (p_delivery_id is null or n.id = p_delivery_id)
    ), due as (
        select d.id from public.webhook_deliveries d join ranked r on r.id = d.id
        where d.delivered_at is null and d.failed_at is null and d.next_attempt_at <= v_now
        order by r.place, d.next_attempt_at limit p_limit for update of d skip locked
    ), claimed as (
        update public.webhook_deliveries d set attempts = d.attempts + 1,
            next_attempt_at = v_now + make_interval(secs => p_lease_seconds)
        from due where d.id = due.id returning d.*
    )
    select coalesce(jsonb_agg(jsonb_build_object(
        'id', c.id, 'attempts', c.attempts, 'created_at', c.created_at, 'webhook_id', w.id, 'url', w.url,
        'encrypted_secret', w.encrypted_secret,
        'previous_encrypted_secret',
        case when w.previous_valid_until > v_now then w.previous_encrypted_secret end,
        'event', case when e.id is not null then to_jsonb(e) end) order by c.id), '[]') into v_claimed
    from claimed c join public.webhooks w on w.id = c.webhook_id
    left join public.budget_events e on e.id = c.event_id;
    return v_claimed;
end $$;
revoke all on function public.claim_deliveries(int, int, bigint) from public, anon, authenticated;
grant execute on function public.claim_deliveries(int, int, bigint) to service_role;

-- p: id, attempt, status, error, delivered, gone (the receiver wants no more: the webhook is switched off),
-- retry_seconds (null: it was the last attempt). Outcomes: finished, stale (the lease ended and somebody else
-- has the delivery).
create function public.finish_delivery(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_retry int := (p ->> 'retry_seconds')::int;
    v_delivered boolean := (p ->> 'delivered')::boolean;
    v_gone boolean := (p ->> 'gone')::boolean;
    v_webhook_id bigint;
begin
    if v_gone then
        -- This changes the webhook too, so the user is locked first, as by every other writer.
        perform from public.users u
        where u.id = (select d.user_id from public.webhook_deliveries d where d.id = (p ->> 'id')::bigint)
        for no key update;
    end if;
    update public.webhook_deliveries d set
        delivered_at = case when v_delivered then v_now end,
        failed_at = case when not v_delivered and (v_gone or v_retry is null) then v_now end,
        next_attempt_at = case when v_delivered or v_retry is null then d.next_attempt_at
                               else v_now + make_interval(secs => v_retry) end,
        last_status = (p ->> 'status')::int, last_error = left(p ->> 'error', 500)
    where d.id = (p ->> 'id')::bigint and d.attempts = (p ->> 'attempt')::int and d.delivered_at is null
      and d.failed_at is null
    returning d.webhook_id into v_webhook_id;
    if not found then
        return jsonb_build_object('outcome', 'stale');
    end if;
    if v_gone then
        update public.webhooks w set is_active = false, disabled_reason = 'the receiver answered 410 Gone',
            updated_at = v_now
        where w.id = v_webhook_id and w.is_active;
    end if;
    return jsonb_build_object('outcome', 'finished');
end $$;
revoke all on function public.finish_delivery(jsonb) from public, anon, authenticated;
grant execute on function public.finish_delivery(jsonb) to service_role;
